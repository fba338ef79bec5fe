"""Ask a question through the model's chat template."""

import asyncio
import sys

from tandem_client import Client, Message


async def main(address: str) -> str:
    async with Client(address) as client:
        answer = await client.generate_text(
            [Message("user", "What does len() return?")], max_tokens=48, temperature=0.0
        )
    print(answer.text)
    print(f"{answer.summary.usage.completion_tokens} tokens, first after {answer.summary.timing.ttft_s * 1e3:.1f} ms")
    return answer.text


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
