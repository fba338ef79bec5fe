"""Stop a generation from outside; leaving the loop early does the same."""

import asyncio
import sys

from tandem_client import Aborted, Client


async def main(address: str) -> int:
    received = 0
    async with Client(address) as client:
        try:
            async for piece in client.generate("Count:", request_id="example-abort", max_tokens=256, ignore_eos=True):
                received += len(piece.tokens)
                await client.abort("example-abort")
        except Aborted as error:
            print(f"stopped after {received} tokens: {error}")
    return received


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
