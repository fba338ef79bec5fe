"""The gateway's HTTP surface: OpenAI's API, health for probes, metrics.

A request's way: `connection` (one socket: bounds and deadlines of heads and bodies) -> `app` (routes) -> `body` (JSON
within bounds) -> `chat_request` or `completion_request` (checked fields to calls) -> `Front.answer` -> `chat_reply` or
`completion_reply` (whole) or `streaming` (server-sent events). Errors of any of them are OpenAI's error object
(`errors`). Nothing here knows gRPC."""
