"""Write the table into the file that is named."""

import asyncio
import sys
from pathlib import Path

from tests.parity.table import make_table, markdown

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(asyncio.run(make_table())))
