"""Several answers to one prompt; its KV cache is computed once where the workers can share it."""

import asyncio
import sys

from tandem_client import Client


async def main(address: str) -> list[str]:
    async with Client(address) as client:
        generations = await client.generate_texts("def area(", n=3, seed=7, max_tokens=24)
    for generation in generations:
        # Answer i is sampled with seed + i: ask for that seed to have it again, alone.
        print(f"--- seed {generation.summary.seed + generation.summary.choice}\n{generation.text}")
    return [generation.text for generation in generations]


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
