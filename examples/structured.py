"""Hold the text to a JSON schema while it is generated: what comes back always parses."""

import asyncio
import json
import sys
from typing import Any

from tandem_client import Client, json_schema

SCHEMA = {
    "type": "object",
    "properties": {
        "language": {"type": "string", "enum": ["Python", "Rust", "C"]},
        "typed": {"type": "boolean"},
    },
    "required": ["language", "typed"],
    "additionalProperties": False,
}


async def main(address: str) -> dict[str, Any]:
    async with Client(address) as client:
        generation = await client.generate_text(
            "A language as JSON:", constraint=json_schema(SCHEMA), max_tokens=128, temperature=0.0
        )
    found: dict[str, Any] = json.loads(generation.text)
    print(found)
    return found


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
