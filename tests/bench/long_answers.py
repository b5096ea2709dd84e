"""How long 2,048 embeddings of 1,024 numbers hold others up while they are written; in processor time."""

from __future__ import annotations

import asyncio
import random
import time

from fastapi.responses import JSONResponse

from server.inference.long_documents import written

INPUTS, NUMBERS = 2048, 1024


async def main() -> None:
    """Prints a line for each way."""
    chance = random.Random(1)
    rows = [{"index": i, "embedding": [chance.random() for _ in range(NUMBERS)]} for i in range(INPUTS)]
    document = {"object": "list", "data": rows}
    turns: list[float] = []

    async def others() -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            turns.append(time.thread_time() - began)

    beside = asyncio.create_task(others())
    await asyncio.sleep(0)
    began = time.thread_time()
    parts = await written(document)
    took = time.thread_time() - began
    beside.cancel()
    print(f"in slices: {took:.2f} s, at most {1000 * max(turns):.1f} ms at once, {len(parts)} parts")
    began = time.thread_time()
    JSONResponse(document)
    print(f"at once: {time.thread_time() - began:.2f} s")


if __name__ == "__main__":
    asyncio.run(main())
