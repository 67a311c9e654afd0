"""The server through the official `openai` package: upload files, ask by chat and by responses, delete a file.

    python examples/openai_client.py --question "Where does Ada Morrow work?" people.md offices.txt

Runs the session twice, with the synchronous and with the asynchronous client; the two have the same methods.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response


def main() -> None:
    args = _parse()
    with OpenAI(base_url=args.base_url, api_key=args.api_key) as client:
        session(client, args.question, args.files)
    asyncio.run(async_session(args))


def session(client: OpenAI, question: str, paths: list[Path]) -> None:
    model = client.models.list().data[0].id  # the language model comes first
    store = client.vector_stores.create(name="openai example")
    try:
        for path in paths:
            file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=path)
            if file.status != "completed":
                raise SystemExit(f"{path}: {file.last_error}")

        print("chat      ", end="")
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"collection": store.id},
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            if chunk.choices and chunk.choices[0].finish_reason:
                sources = (chunk.model_extra or {})["sources"]
            if chunk.usage:
                receipt = (chunk.usage.model_extra or {})["fusionrag"]
        print()
        for source in sources:
            print(f"  [{source['index']}] {source['title']} ({source['source']})")
        print(f"  {receipt['ttft_ms']:.0f} ms to the first token; {receipt['reused_tokens']} tokens reused")

        response = client.responses.create(
            model=model, input=question, tools=[{"type": "file_search", "vector_store_ids": [store.id]}]
        )
        print(f"responses {response.output_text}")
        print(f"  cited: {', '.join(cited(response))}")

        first = client.vector_stores.files.list(store.id, order="asc").data[0]
        client.files.delete(first.id)
        left = [found.filename for found in client.vector_stores.search(store.id, query=question)]
        print(f"  found once {paths[0].name} is deleted: {', '.join(left) or 'nothing'}")
    finally:
        for attached in client.vector_stores.files.list(store.id):
            client.files.delete(attached.id)
        client.vector_stores.delete(store.id)


async def async_session(args: argparse.Namespace) -> None:
    """The same in short: passages of one's own, no upload."""
    async with AsyncOpenAI(base_url=args.base_url, api_key=args.api_key) as client:
        model = (await client.models.list()).data[0].id
        documents = [{"title": path.stem, "text": path.read_text(encoding="utf-8")} for path in args.files]
        answer = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": args.question}],
            extra_body={"documents": documents},
        )
        print(f"async     {answer.choices[0].message.content}")


def cited(response: Response) -> list[str]:
    """The names of the files that an answer of the Responses API cites."""
    parts = [part for item in response.output if item.type == "message" for part in item.content]
    notes = [note for part in parts if part.type == "output_text" for note in part.annotations]
    return sorted({note.filename for note in notes if note.type == "file_citation"})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--question", required=True)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
