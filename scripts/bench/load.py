"""A running server under load: several clients stream at once; TTFT is stamped at the first non-empty content."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from fusionrag.errors import ConfigError
from scripts.bench.timing import finish, percentiles
from scripts.sample import questions as sample_questions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--collection", default="default", help="collection to ask (default: %(default)s)")
    parser.add_argument("--questions", type=Path, help="JSONL with a 'question' a line; default: the sample questions")
    parser.add_argument("--num-requests", type=int, default=32, help="requests in all (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=4, help="clients at the same time (default: %(default)s)")
    parser.add_argument("--api-key", default="", help="the server's key")
    parser.add_argument("--json", type=Path, help="write the result here as well")


def run(args: argparse.Namespace) -> int:
    if args.questions:
        questions = [json.loads(line)["question"] for line in args.questions.read_text().splitlines() if line.strip()]
    else:
        questions = [q["question"] for q in sample_questions()]
    begin = time.perf_counter()
    answers = asyncio.run(_run(args, questions))
    duration_s = time.perf_counter() - begin
    if not answers:
        raise ConfigError("url", f"no request to {args.url} succeeded")
    row = {
        "num_requests": args.num_requests,
        "failed": args.num_requests - len(answers),
        "concurrency": args.concurrency,
        **percentiles("ttft_ms", [ttft for ttft, _ in answers]),
        **percentiles("e2el_ms", [e2el for _, e2el in answers]),
        "request_throughput": round(len(answers) / duration_s, 3),
    }
    for key, value in row.items():
        print(f"{key:<20} {value}")
    finish(
        {"command": "bench load", "args": {"url": args.url, "collection": args.collection}, "rows": [row]}, args.json
    )
    return 0 if len(answers) == args.num_requests else 1


async def _run(args: argparse.Namespace, questions: list[str]) -> list[tuple[float, float]]:
    """(TTFT, end to end) in ms of each request that succeeded."""
    from openai import AsyncOpenAI, OpenAIError

    client = AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.api_key or "none", max_retries=0)
    model = (await client.models.list()).data[0].id
    slots, answers = asyncio.Semaphore(args.concurrency), list[tuple[float, float]]()

    async def ask(question: str) -> None:
        async with slots:
            begin, first = time.perf_counter(), 0.0
            messages: Any = [{"role": "user", "content": question}]
            try:
                stream = await client.chat.completions.create(
                    model=model, messages=messages, stream=True, extra_body={"collection": args.collection}
                )
                async for chunk in stream:
                    if not first and chunk.choices and chunk.choices[0].delta.content:
                        first = time.perf_counter()
            except OpenAIError as error:
                print(f"failed: {error}")
                return
            if first:
                answers.append(((first - begin) * 1e3, (time.perf_counter() - begin) * 1e3))

    await asyncio.gather(*(ask(questions[i % len(questions)]) for i in range(args.num_requests)))
    return answers
