"""How surprised is the model by a text? The log-probability of every token of the prompt."""

import asyncio
import math
import sys

from tandem_client import Client


async def main(address: str) -> float:
    async with Client(address) as client:
        generation = await client.generate_text("import os\nimport sys\n", max_tokens=1, prompt_logprobs=1)
    scored = [token for token in generation.prompt_scores if token.logprob is not None]
    for token in scored:
        best = token.alternatives[0]
        print(f"{token.text!r:>12} {token.logprob:8.3f}   likeliest: {best.text!r} {best.logprob:.3f}")
    perplexity = math.exp(-sum(token.logprob or 0.0 for token in scored) / len(scored))
    print(f"perplexity {perplexity:.2f}")
    return perplexity


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
