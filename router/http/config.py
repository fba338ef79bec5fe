"""Configuration of the gateway's HTTP surface."""

from pydantic import Field

from core.config import ConfigModel

DEFAULT_PORT = 8000


class HttpConfig(ConfigModel):
    """OpenAI's API over HTTP."""

    enabled: bool = True
    host: str | None = Field(None, description="absent: the gateway's own host")
    port: int | None = Field(
        None, ge=0, le=65535, description="0 takes a free one; absent: 8000, or a free one where the gateway's port is"
    )
    max_body_bytes: int = Field(8 * 2**20, ge=1, description="of a request; a larger one is refused as it arrives")
    max_header_bytes: int = Field(32 * 2**10, ge=1, description="of a request's line and headers together")
    header_timeout_s: float = Field(10.0, gt=0, description="from the first byte of a request, or from the connection")
    body_timeout_s: float = Field(60.0, gt=0, description="from the end of the headers to the end of the body")
    keep_alive_s: float = Field(75.0, gt=0, description="a connection without a request is closed after so long")
    max_connections: int = Field(8192, ge=1, description="further ones are turned away")
