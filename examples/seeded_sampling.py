"""The same seed gives the same text, whoever serves it and whatever runs beside it."""

import asyncio
import sys

from tandem_client import Client


async def main(address: str) -> tuple[str, str]:
    async with Client(address) as client:
        draws = [client.generate_text("The module", max_tokens=24, temperature=0.8, seed=7) for _ in range(2)]
        first, second = await asyncio.gather(*draws)
    print(first.text)
    print("same again" if first.text == second.text else f"different: {second.text}")
    return first.text, second.text


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
