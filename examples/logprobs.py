"""Show how sure the model is of each token, and what else it considered."""

import asyncio
import sys

from tandem_client import Client, Token


async def main(address: str) -> tuple[Token, ...]:
    async with Client(address) as client:
        generation = await client.generate_text("import os", max_tokens=8, temperature=0.0, logprobs=3)
    for token in generation.tokens:
        others = ", ".join(f"{other.text!r} {other.logprob:.2f}" for other in token.alternatives)
        print(f"{token.index:3d}  id {token.token_id:6d}  {token.logprob:8.3f}   {others}")
    return generation.tokens


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
