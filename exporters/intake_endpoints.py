"""What each path of the intake takes, and how it answers: our own rows, OTLP, LiteLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from aiohttp import web
from google.protobuf.json_format import MessageToJson
from google.rpc.status_pb2 import Status

from exporters.conventions_rows import Mapper, of_headers
from exporters.intake_bodies import DECODERS, REFUSALS_SHOWN, Rows, fill, refusal
from exporters.intake_letters import RefusedSpan
from exporters.intake_options import IntakeOptions
from exporters.litellm import LiteLlmReader, Payloads
from exporters.otlp import OtlpReader, Spans
from exporters.rows import Split
from schemas.columns import Batch
from schemas.errors import InvalidRecord
from schemas.log import CONTENT_JSON

CONTENT_PROTOBUF = "application/x-protobuf"
SPAN = "otlp.span"
GRPC_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 408: 4, 413: 8, 415: 3, 429: 8, 503: 14}
"""HTTP status -> code of google.rpc.Status."""


class Taken(NamedTuple):
    """What was made of a body."""

    batch: Batch
    type: str
    """What its refused parts were, for dead letters."""
    found: Rows | Spans | Payloads
    refused: int = 0
    skipped: int = 0
    letters: list[RefusedSpan] = []  # noqa: RUF012 - never changed
    rows_each: int = 1
    """Rows that one thing sent becomes."""
    split: Split = Split([], 0)


Decode = Callable[[bytes], Taken]


class OwnRows:
    """Rows of our own schema."""

    path = "/v1/requests"

    def __init__(self, options: IntakeOptions) -> None:
        self.options = options

    def decoder(self, request: web.Request) -> Decode:
        """By content type. Raises HTTPUnsupportedMediaType."""
        decode = DECODERS.get(request.content_type)
        if decode is None:
            raise web.HTTPUnsupportedMediaType(text=f"send Content-Type {', '.join(DECODERS)}")

        headers = {name.lower(): value for name, value in request.headers.items()}
        fallbacks = (("tenant", self.options.tenant_headers), ("class", self.options.class_headers))
        said = {column: named for column, names in fallbacks if (named := of_headers(names, headers))}

        def taken(body: bytes) -> Taken:
            found = decode(body)
            for column, value in said.items():
                fill(found.batch, column, value)
            return Taken(found.batch, "request.rows", found, refused=found.refused)

        return taken

    def answer(self, request: web.Request, taken: Taken) -> web.Response:
        """200: all is with the broker; 207: what was not refused is; 400: all was refused."""
        found = taken.found
        assert isinstance(found, Rows)
        status = 200 if not found.refused else 207 if found.batch.rows else 400
        return web.json_response(
            {
                "accepted": found.batch.rows,
                "refused_rows": found.refused,
                "refused": found.refusals[:REFUSALS_SHOWN],
            },
            status=status,
        )

    def refuse(
        self, request: web.Request, status: int, why: str | InvalidRecord, headers: dict[str, str]
    ) -> web.Response:
        """Nothing was taken."""
        if isinstance(why, InvalidRecord):
            one = refusal(None, why.reason, why.field, why.value, why.remedy)
            return web.json_response({"accepted": 0, "refused_rows": None, "refused": [one]}, status=status)
        return web.json_response({"accepted": 0, "error": why}, status=status, headers=headers)


class OtlpHttp:
    """OTLP over HTTP, binary or JSON, as its specification has it."""

    path = "/v1/traces"

    def __init__(self, options: IntakeOptions, mapper: Mapper) -> None:
        self.reader = OtlpReader(mapper, options.rows_max)

    def decoder(self, request: web.Request) -> Decode:
        """By content type. Raises HTTPUnsupportedMediaType."""
        read = {CONTENT_PROTOBUF: self.reader.protobuf, CONTENT_JSON: self.reader.json}.get(request.content_type)
        if read is None:
            raise web.HTTPUnsupportedMediaType(text=f"send Content-Type {CONTENT_PROTOBUF} or {CONTENT_JSON}")
        headers = {name.lower(): value for name, value in request.headers.items()}

        def taken(body: bytes) -> Taken:
            return of_calls(read(body, headers), SPAN)

        return taken

    def answer(self, request: web.Request, taken: Taken) -> web.Response:
        """200, with `partial_success` where spans were refused."""
        assert isinstance(taken.found, Spans)
        message = taken.found.response()
        if request.content_type == CONTENT_JSON:
            return web.Response(text=MessageToJson(message), content_type=CONTENT_JSON)
        return web.Response(body=message.SerializeToString(), content_type=CONTENT_PROTOBUF)

    def refuse(
        self, request: web.Request, status: int, why: str | InvalidRecord, headers: dict[str, str]
    ) -> web.Response:
        """A google.rpc.Status in the encoding of the request."""
        message = Status(code=GRPC_CODES.get(status, 2), message=str(why))
        if request.content_type == CONTENT_PROTOBUF:
            body = message.SerializeToString()
            return web.Response(body=body, status=status, content_type=CONTENT_PROTOBUF, headers=headers)
        return web.Response(text=MessageToJson(message), status=status, content_type=CONTENT_JSON, headers=headers)


def of_calls(found: Spans | Payloads, type: str) -> Taken:
    """Calls as what is stored: an arrival and an end each."""
    return Taken(
        found.batch,
        type,
        found,
        refused=len(found.refused),
        skipped=found.skipped,
        letters=found.refused,
        rows_each=2,
    )


class LiteLlm:
    """Batches of LiteLLM's generic API logger."""

    path = "/v1/litellm"

    def __init__(self, options: IntakeOptions, mapper: Mapper) -> None:
        self.reader = LiteLlmReader(mapper, options.rows_max)

    def decoder(self, request: web.Request) -> Decode:
        """JSON, or a JSON object a line, whatever the content type says: the logger's can be configured away."""
        headers = {name.lower(): value for name, value in request.headers.items()}

        def taken(body: bytes) -> Taken:
            return of_calls(self.reader.read(body, headers), "litellm.payload")

        return taken

    def answer(self, request: web.Request, taken: Taken) -> web.Response:
        """Always 200: the logger would send everything again, though what was refused once always will be."""
        found = taken.found
        assert isinstance(found, Payloads)
        why = sorted({f"{one.field}: {one.remedy}" for one in found.refused})[:REFUSALS_SHOWN]
        return web.json_response(
            {"accepted": found.batch.rows // 2, "skipped": found.skipped, "refused": len(found.refused), "why": why}
        )

    def refuse(
        self, request: web.Request, status: int, why: str | InvalidRecord, headers: dict[str, str]
    ) -> web.Response:
        """Nothing was taken."""
        return web.json_response({"accepted": 0, "error": str(why)}, status=status, headers=headers)
