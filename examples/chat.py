"""Ask a question through the model's chat template, then go on with the conversation."""

import asyncio
import sys

from tandem_client import Client, Message


async def main(address: str) -> str:
    conversation = [Message("user", "What does len() return?")]
    async with Client(address) as client:
        answer = await client.chat_message(conversation, max_tokens=48, temperature=0.0)
        print(answer.message.content)
        conversation += [answer.message, Message("user", "And for a dict?")]
        answer = await client.chat_message(conversation, max_tokens=48, temperature=0.0)
    print(answer.message.content)
    usage = answer.summary.usage
    print(f"{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them from the cache of the turn before")
    return answer.message.content


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
