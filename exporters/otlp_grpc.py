"""OTLP over gRPC: the same spans, limits and promises as over HTTP, with the answers that gRPC has for them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import structlog
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from exporters.intake_auth import Certificate
from exporters.intake_endpoints import SPAN, of_calls
from exporters.intake_options import IntakeOptions
from exporters.intake_sink import NotStored
from exporters.otlp import OtlpReader
from schemas.errors import InvalidRecord, SettingsError

if TYPE_CHECKING:
    from exporters.intake import Intake

log = structlog.get_logger(__name__)

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
DETAILS = "grpc-status-details-bin"
CODES = {
    413: grpc.StatusCode.INVALID_ARGUMENT,  # RESOURCE_EXHAUSTED would be sent again for ever
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class OtlpGrpc:
    """The server. `port` is known once it has started."""

    def __init__(self, intake: Intake) -> None:
        self.intake, self.options = intake, intake.options
        self.reader = OtlpReader(intake.mapper, self.options.rows_max)
        self.port = 0
        self._server: Any = None

    async def start(self) -> None:
        """Raises SettingsError for an address or certificate that cannot be used."""
        limit = self.options.body_bytes_max
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=self.options.requests_max * 32,  # most of them wait for the broker
        )
        method = grpc.unary_unary_rpc_method_handler(
            self._export, response_serializer=ExportTraceServiceResponse.SerializeToString
        )
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Export": method})])
        host = self.options.host
        address = f"[{host}]:{self.options.grpc_port}" if ":" in host else f"{host}:{self.options.grpc_port}"
        try:
            credentials = _credentials(self.options)
            if credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise SettingsError(f"FLEETLOOP_INTAKE_GRPC_PORT: {address}: {error}: choose a free port") from None
        await server.start()
        self._server = server
        log.info("intake listens", address=f"{'grpcs' if credentials else 'grpc'}://{host}:{self.port}")

    async def stop(self, within_s: float) -> None:
        """Those who wait for the broker have so long."""
        if self._server is not None:
            await self._server.stop(within_s)

    async def _export(self, body: bytes, context: Any) -> ExportTraceServiceResponse:
        metadata = {str(k).lower(): str(v) for k, v in context.invocation_metadata() or () if isinstance(v, str)}
        intake = self.intake
        address = context.peer().rpartition(":")[0]  # without the port: a new connection is no new client
        client = intake.clients.name(metadata.get("authorization", ""), _certificate(context), address)
        if client is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "send metadata authorization: Bearer <token>")
        began = time.monotonic()
        try:
            intake.admit(client)
            intake.decoding += 1
            try:
                taken = await intake.decoded(lambda: of_calls(self.reader.protobuf(body, metadata), SPAN), len(body))
            finally:
                intake.decoding -= 1
            took_s = time.monotonic() - began
            await intake.store(taken.batch, taken.split, client)
        except NotStored as error:
            intake.not_stored(error.status)
            await self._abort(context, CODES[error.status], error.why)
        except InvalidRecord as refused:
            intake.edge.metrics.failed(refused.reason)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(refused))
        intake.count(taken, took_s)
        return taken.found.response()

    async def _abort(self, context: Any, code: grpc.StatusCode, why: str) -> NoReturn:
        """With the time to wait, without which a sender may not try again."""
        if code is not grpc.StatusCode.INVALID_ARGUMENT:
            status = Status(code=code.value[0], message=why)
            info = RetryInfo()
            info.retry_delay.FromSeconds(self.options.retry_after_s)
            status.details.add().Pack(info)
            context.set_trailing_metadata(((DETAILS, status.SerializeToString()),))
        await context.abort(code, why)
        raise AssertionError("abort raises")


def _certificate(context: Any) -> Certificate | None:
    names = context.auth_context().get("x509_common_name", [])
    return {"subject": [[("commonName", name.decode("utf-8", "replace"))] for name in names]} if names else None


def _credentials(options: IntakeOptions) -> Any:
    """TLS as gRPC wants it; None: plain. The files were read once already, by `options.tls`."""
    if options.tls_cert_file is None or options.tls_key_file is None:
        return None
    authorities = options.tls_client_ca_file.read_bytes() if options.tls_client_ca_file else None
    pair = (options.tls_key_file.read_bytes(), options.tls_cert_file.read_bytes())
    return grpc.ssl_server_credentials([pair], authorities, require_client_auth=authorities is not None)
