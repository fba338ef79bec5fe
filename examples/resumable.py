"""A stream that outlives its connection: the client reads on where it was, at any gateway that it can reach."""

import asyncio
import sys

from tandem_client import Client, ServingError


def tell(error: ServingError, wait_s: float) -> None:
    print(f"\n[{error}; on in {wait_s:.2f} s]")


async def main(address: str) -> str:
    text = ""
    async with Client(address, on_retry=tell) as client:
        async for piece in client.generate("def add(a, b):", max_tokens=48, temperature=0.0, resume_window_s=30.0):
            print(piece.text, end="", flush=True)
            text += piece.text
    print()
    return text


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
