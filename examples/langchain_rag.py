"""The server from LangChain, in three ways, from the least code to the most control.

    pip install langchain-openai
    python examples/langchain_rag.py --question "Where does Ada Morrow work?" people.md offices.txt

1. `file_search`: the server retrieves, answers and cites, and takes the passages' KV from where it is stored.
2. A retriever over the server's search, in a chain of LangChain's.
3. LangChain's own vector store, filled by the server's embedding model.

In 2 and 3 the passages go to the server as `documents`, not in the text of the message: there they are spelled as the
model wants them and can be cited. Their KV is reused where title and text are those of a stored passage.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import OpenAI


class VectorStoreRetriever(BaseRetriever):
    """LangChain documents from POST /v1/vector_stores/{id}/search."""

    client: Any
    vector_store_id: str
    top_k: int = 4

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        found = self.client.vector_stores.search(self.vector_store_id, query=query, max_num_results=self.top_k)
        return [
            Document(
                page_content="\n".join(part.text for part in result.content),
                metadata={"source": result.filename, "file_id": result.file_id, "score": result.score},
            )
            for result in found
        ]


def chain_over(retriever: BaseRetriever, llm: ChatOpenAI) -> Runnable[str, str]:
    """question → passages → answer."""

    def answer(asked: dict[str, Any]) -> str:
        documents = [{"text": d.page_content, "id": d.metadata.get("source", "")} for d in asked["documents"]]
        return str(llm.invoke(asked["question"], extra_body={"documents": documents}).content)

    return {"documents": retriever, "question": RunnablePassthrough()} | RunnableLambda(answer)


def main() -> None:
    args = _parse()
    with OpenAI(base_url=args.base_url, api_key=args.api_key) as client:
        run(client, args)


def run(client: OpenAI, args: argparse.Namespace) -> None:
    chat_model, embedding_model = (model.id for model in client.models.list())
    server = {"base_url": args.base_url, "api_key": args.api_key}
    llm = ChatOpenAI(model=chat_model, **server)

    store = client.vector_stores.create(name="langchain example")
    try:
        for path in args.files:
            file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=path)
            if file.status != "completed":
                raise SystemExit(f"{path}: {file.last_error}")

        tool = {"type": "file_search", "vector_store_ids": [store.id]}
        message = (
            ChatOpenAI(model=chat_model, use_responses_api=True, **server).bind_tools([tool]).invoke(args.question)
        )
        notes = [note for block in message.content for note in block.get("annotations", ())]
        print(f"file_search  {message.text}")
        print(f"  cited: {', '.join(sorted({note['filename'] for note in notes}))}")

        retriever = VectorStoreRetriever(client=client, vector_store_id=store.id)
        print(f"retriever    {chain_over(retriever, llm).invoke(args.question)}")
        print(f"  found: {', '.join(d.metadata['source'] for d in retriever.invoke(args.question))}")

        # the server counts tokens itself; LangChain would send token ids of OpenAI's own models
        embeddings = OpenAIEmbeddings(model=embedding_model, check_embedding_ctx_length=False, **server)
        local = InMemoryVectorStore(embeddings)
        local.add_documents([Document(path.read_text(), metadata={"source": path.name}) for path in args.files])
        print(f"own store    {chain_over(local.as_retriever(search_kwargs={'k': 4}), llm).invoke(args.question)}")
    finally:
        for attached in client.vector_stores.files.list(store.id):
            client.files.delete(attached.id)
        client.vector_stores.delete(store.id)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--question", required=True)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
