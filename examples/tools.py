"""Have the model call a function, run it, and let the model answer with what it returned."""

import asyncio
import json
import sys

from tandem_client import Client, Message, Tool

CAPITALS = {"France": "Paris", "Japan": "Tokyo"}
TOOL = Tool(
    "capital_of",
    "The capital of a country",
    {
        "type": "object",
        "properties": {"country": {"type": "string", "enum": sorted(CAPITALS)}},
        "required": ["country"],
        "additionalProperties": False,
    },
)


async def main(address: str) -> dict[str, str]:
    conversation = [Message("user", "What is the capital of Japan?")]
    async with Client(address) as client:
        # Left to itself (tool_choice="auto") the model decides; here a grammar makes it call.
        asked = await client.chat_message(
            conversation,
            tools=[TOOL],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=128,
            temperature=0.0,
        )
        (call,) = asked.message.tool_calls
        arguments: dict[str, str] = json.loads(call.arguments)
        print(f"{call.name}({arguments})")
        result = Message("tool", CAPITALS[arguments["country"]], tool_call_id=call.id)
        answer = await client.chat_message([*conversation, asked.message, result], tools=[TOOL], max_tokens=32)
    print(answer.message.content)
    return arguments


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
