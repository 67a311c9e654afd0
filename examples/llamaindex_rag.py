"""The server from LlamaIndex, through its OpenAI-like classes: a query engine over the server's search, and one over
an index of LlamaIndex's own that the server's embedding model fills.

    pip install -r examples/llamaindex-requirements.txt
    python examples/llamaindex_rag.py --question "Where does Ada Morrow work?" people.md offices.txt

These classes want an older `openai` than the server's tests, so install them into an environment of their own; a client
needs nothing of the server's.

Passages go to the server as `documents`, not in the text of the message: there they are spelled as the model wants them
and can be cited. Their KV is reused where title and text are those of a stored passage.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.response.schema import Response
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from openai import OpenAI


class VectorStoreRetriever(BaseRetriever):
    """LlamaIndex nodes from POST /v1/vector_stores/{id}/search."""

    def __init__(self, client: OpenAI, vector_store_id: str, top_k: int = 4) -> None:
        super().__init__()
        self._client, self._vector_store_id, self._top_k = client, vector_store_id, top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._client.vector_stores.search(
            self._vector_store_id, query=query_bundle.query_str, max_num_results=self._top_k
        )
        return [
            NodeWithScore(
                node=TextNode(text="\n".join(p.text for p in r.content), metadata={"source": r.filename}), score=r.score
            )
            for r in found
        ]


class DocumentsQueryEngine(CustomQueryEngine):
    """Retrieves, and lets the server answer from what was found."""

    retriever: BaseRetriever
    llm: OpenAILike

    def custom_query(self, query_str: str) -> Response:
        nodes = self.retriever.retrieve(query_str)
        documents = [
            {"text": n.node.get_content(MetadataMode.NONE), "id": n.node.metadata.get("source", "")} for n in nodes
        ]
        reply = self.llm.chat([ChatMessage(role="user", content=query_str)], extra_body={"documents": documents})
        return Response(str(reply.message.content), source_nodes=nodes, metadata={"usage": reply.raw.usage.model_extra})


def main() -> None:
    args = _parse()
    with OpenAI(base_url=args.base_url, api_key=args.api_key) as client:
        run(client, args)


def run(client: OpenAI, args: argparse.Namespace) -> None:
    chat_model, embedding_model = list(client.models.list())
    server = {"api_base": args.base_url, "api_key": args.api_key}
    window = int((chat_model.model_extra or {})["max_model_len"])
    llm = OpenAILike(model=chat_model.id, is_chat_model=True, context_window=window, **server)

    store = client.vector_stores.create(name="llamaindex example")
    try:
        for path in args.files:
            file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=path)
            if file.status != "completed":
                raise SystemExit(f"{path}: {file.last_error}")
        engine = DocumentsQueryEngine(retriever=VectorStoreRetriever(client, store.id), llm=llm)
        show("server's search", engine.query(args.question))

        index = VectorStoreIndex.from_documents(
            [Document(text=path.read_text(), metadata={"source": path.name}) for path in args.files],
            embed_model=OpenAILikeEmbedding(model_name=embedding_model.id, **server),
        )
        engine = DocumentsQueryEngine(retriever=index.as_retriever(similarity_top_k=4), llm=llm)
        show("own index", engine.query(args.question))
    finally:
        for attached in client.vector_stores.files.list(store.id):
            client.files.delete(attached.id)
        client.vector_stores.delete(store.id)


def show(name: str, response: Any) -> None:
    print(f"{name:<16} {response}")
    print(f"  found: {', '.join(n.node.metadata['source'] for n in response.source_nodes)}")
    receipt = response.metadata["usage"]["fusionrag"]
    print(f"  {receipt['ttft_ms']:.0f} ms to the first token; {receipt['reused_tokens']} tokens reused")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--question", required=True)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
