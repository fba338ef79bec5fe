"""The client: a connection to the gateways of one cluster, any number of generations at once."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, Unpack

from core.errors import InvalidRequest, ServingError
from core.tls import ClientTls
from protos import admin_pb2
from protos import inference_pb2 as pb
from tandem_client import cluster_replies, keys, replies, requests
from tandem_client.cluster_types import ClusterStatus, KvDecision, ModelInfo, RouteDecision
from tandem_client.collecting import Generations, Replies
from tandem_client.connection import Connection
from tandem_client.keys import KnownKey
from tandem_client.options import ChatOptions, Options
from tandem_client.requests import Prompt
from tandem_client.streaming import Retries
from tandem_client.types import ChatPiece, Generation, Message, Piece, Reply, Started, Tool


class Client:
    """A connection to a gateway.

    Args:
        address: host:port; or of several gateways of one cluster, separated by commas: calls go to them in turn.
        timeout_s: of the calls that are no generation.
        max_retries: how often a generation that was refused for now (or whose gateway cannot be reached) is tried again
            before its first token. After the first token nothing is ever begun anew.
        tenant: on whose account everything goes.
        api_key: shown with every call; also a JWT.
        tls: how to be sure who answers, and what to show; None: no TLS.
        on_retry: told why a generation was refused for now or lost its connection, and the seconds until it goes on.

    Every method raises a `ServingError` of the kind that the gateway reported.
    Concurrency: one event loop; calls may overlap.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 10.0,
        max_retries: int = 2,
        tenant: str = "",
        api_key: str = "",
        tls: ClientTls | None = None,
        on_retry: Callable[[ServingError, float], None] = lambda _, __: None,
    ) -> None:
        self._connection = Connection(
            address,
            timeout_s=timeout_s,
            retries=Retries(max_retries, on_retry),
            tenant=tenant,
            api_key=api_key,
            tls=tls,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End everything that is still running."""
        await self._connection.close()

    async def generate(self, prompt: Prompt, *, n: int = 1, **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """Stream a generation. Leaving the loop early aborts it (use `contextlib.aclosing` to be sure when).

        Args:
            prompt: text, token ids, or `Message`s of a chat.
            n: answers to it, numbered by `Piece.choice`.
            options: see `tandem_client.options`.
        """
        request = requests.generate_request(prompt, options, n=n, tenant=self._connection.tenant)
        connection = self._connection
        resumption = connection.resumption(request, lambda response: response.generate)
        started: Started | None = None
        async with aclosing(connection.events(connection.inference.Generate, request, options, resumption)) as events:
            async for response in events:
                match response.WhichOneof("event"):
                    case "started":
                        started = replies.started_of(response.started)
                    case "delta" if started is not None:
                        delta = response.delta
                        yield Piece(started, delta.choice, delta.text, replies.tokens_of(delta.tokens))
                    case "finished" if started is not None:
                        summary = replies.summary_of(started, response.finished)
                        yield Piece(started, summary.choice, "", (), summary)
                    case other:
                        raise ServingError(f"the gateway sent {other or 'an empty message'} out of place")

    async def generate_text(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Generate to the end and return it whole."""
        (generation,) = await self.generate_texts(prompt, n=1, **options)
        return generation

    async def generate_texts(self, prompt: Prompt, *, n: int, **options: Unpack[Options]) -> list[Generation]:
        """Generate n answers to the end and return them in order."""
        collected = Generations(n)
        async for piece in self.generate(prompt, n=n, **options):
            collected.add(piece)
        return collected.whole()

    async def chat(
        self, messages: Sequence[Message], *, n: int = 1, **options: Unpack[ChatOptions]
    ) -> AsyncGenerator[ChatPiece, None]:
        """Stream the next message of a conversation. Leaving the loop early aborts it, as in `generate`.

        Args:
            n: answers, numbered by `ChatPiece.choice`.
            options: see `tandem_client.options`.
        """
        request = requests.chat_request(messages, options, n=n, tenant=self._connection.tenant)
        connection = self._connection
        resumption = connection.resumption(request, lambda response: response.chat)
        started: Started | None = None
        async with aclosing(connection.events(connection.inference.Chat, request, options, resumption)) as events:
            async for response in events:
                match response.WhichOneof("event"):
                    case "started":
                        started = replies.started_of(response.started)
                    case "delta" if started is not None:
                        delta = response.delta
                        calls, tokens = replies.tool_calls_of(delta.tool_calls), replies.tokens_of(delta.tokens)
                        yield ChatPiece(started, delta.choice, delta.content, calls, tokens)
                    case "finished" if started is not None:
                        summary = replies.summary_of(started, response.finished)
                        yield ChatPiece(started, summary.choice, "", (), (), summary)
                    case other:
                        raise ServingError(f"the gateway sent {other or 'an empty message'} out of place")

    async def chat_message(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Reply:
        """Return the next message of a conversation whole; put it behind the others to go on."""
        (reply,) = await self.chat_messages(messages, n=1, **options)
        return reply

    async def chat_messages(
        self, messages: Sequence[Message], *, n: int, **options: Unpack[ChatOptions]
    ) -> list[Reply]:
        """Return n answers to a conversation whole and in order."""
        collected = Replies(n)
        async for piece in self.chat(messages, n=n, **options):
            collected.add(piece)
        return collected.whole()

    async def abort(self, request_id: str) -> bool:
        """End a generation by its name. Returns whether it was running."""
        request = pb.AbortRequest(request_id=request_id, tenant=self._connection.tenant)
        return (await self._connection.told(self._connection.inference.Abort, request)).found

    async def model_info(self, model: str = "") -> ModelInfo:
        """Return the facts about the model served."""
        request = pb.GetModelInfoRequest(model=model)
        return cluster_replies.model_info_of(
            await self._connection.told(self._connection.inference.GetModelInfo, request)
        )

    async def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        model: str = "",
        tools: Sequence[Tool] = (),
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt as the model would see it."""
        request = requests.tokenize_request(prompt, model, tools, template_arguments)
        return list((await self._connection.told(self._connection.inference.Tokenize, request)).ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """Return the text of token ids, special tokens left out."""
        try:
            request = pb.DetokenizeRequest(model=model, ids=token_ids)
        except (TypeError, ValueError) as error:
            raise InvalidRequest("ids", f"cannot be sent: {error}") from error
        return (await self._connection.told(self._connection.inference.Detokenize, request)).text

    async def status(self) -> ClusterStatus:
        """Return the cluster as this gateway sees it."""
        request = admin_pb2.GetClusterStatusRequest()
        return cluster_replies.cluster_status_of(
            await self._connection.told(self._connection.admin.GetClusterStatus, request)
        )

    async def kv_decisions(self, worker_id: str = "", *, last: int = 100) -> list[KvDecision]:
        """Return which compression profiles were chosen for the last KV transfers, newest first per prefill worker.

        Args:
            worker_id: of one prefill worker; empty: of all.
            last: per worker.
        """
        request = admin_pb2.AdminListKvDecisionsRequest(worker_id=worker_id, last=last)
        return cluster_replies.kv_decisions_of(
            await self._connection.told(self._connection.admin.ListKvDecisions, request)
        )

    async def explain(self, request_id: str = "", *, last: int = 20) -> list[RouteDecision]:
        """Return why requests were placed where they were, newest first, as far as the gateway still knows.

        Args:
            request_id: of one request; empty: of any. Only the gateway that served it knows, so ask with its address.
            last: at most so many decisions.
        """
        request = admin_pb2.ExplainRequestRequest(request_id=request_id, last=last)
        return cluster_replies.route_decisions_of(
            await self._connection.told(self._connection.admin.ExplainRequest, request)
        )

    async def create_api_key(
        self, name: str, *, tenant: str = "", roles: Sequence[str] = ("inference",), lifetime_s: float | None = None
    ) -> tuple[KnownKey, str]:
        """Make an API key. Returns what is known of it, and the key itself, which nobody can be asked for again.

        Args:
            roles: of inference and admin.
            lifetime_s: it expires after so long; None: never.
        """
        request = keys.create_request(name, tenant, roles, lifetime_s)
        response = await self._connection.told(self._connection.admin.CreateApiKey, request)
        return keys.known_key_of(response.api_key), response.secret

    async def list_api_keys(self) -> list[KnownKey]:
        """Return every API key that the gateway knows, oldest first."""
        response = await self._connection.told(self._connection.admin.ListApiKeys, admin_pb2.ListApiKeysRequest())
        return [keys.known_key_of(key) for key in response.api_keys]

    async def revoke_api_key(self, fingerprint: str) -> KnownKey:
        """End an API key, for the whole cluster within a moment. Returns it."""
        request = admin_pb2.RevokeApiKeyRequest(fingerprint=fingerprint)
        return keys.known_key_of((await self._connection.told(self._connection.admin.RevokeApiKey, request)).api_key)
