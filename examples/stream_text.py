"""Print a generation as it comes."""

import asyncio
import sys

from tandem_client import Client


async def main(address: str) -> str:
    text = ""
    async with Client(address) as client:
        async for piece in client.generate("def add(a, b):", max_tokens=48, temperature=0.0):
            print(piece.text, end="", flush=True)
            text += piece.text
    print()
    return text


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
