"""TLS for servers and clients: certificates from files, checked when they are named, followed when they change."""

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Self, TypeVar

import grpc
import structlog

_log = structlog.get_logger()

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """What a server proves with who it is, and whom it lets in. All files are PEM.

    Attributes:
        cert, key: its certificate, with those between it and its authority, and the private key of it.
        client_ca: authorities, of one of which a client must have a certificate; None: everybody is let in.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    @classmethod
    def of(cls, cert: Path | None, key: Path | None, client_ca: Path | None, *, prefix: str = "") -> Self | None:
        """The settings `tls_cert`, `tls_key` and `tls_client_ca`, behind a prefix; None where they are unset.

        ValueError says which setting is missing, or which file is at fault and why.
        """
        if cert is None and key is None and client_ca is None:
            return None
        if cert is None or key is None:
            raise ValueError(f"{prefix}tls_cert and {prefix}tls_key are needed, both of them, for TLS")
        tls = cls(cert=cert, key=key, client_ca=client_ca)
        tls.ssl_context()
        return tls

    def ssl_context(self) -> ssl.SSLContext:
        """For a server of Python's own sockets; ValueError for files that are not what they must be."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _load_pair(context, self.cert, self.key)
        if self.client_ca is not None:
            _load_authorities(context, self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def followed_ssl_context(self) -> ssl.SSLContext:
        """The same, where connections that begin after the files have changed get what these are then."""
        followed = Followed(self._files, self.ssl_context)
        context = latest = self.ssl_context()

        def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            nonlocal latest
            latest = followed.renewed() or latest
            connection.context = latest

        context.sni_callback = renew
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a server of gRPC; it follows the files as `followed_ssl_context` does."""
        followed = Followed(self._files, self._grpc_configuration)
        return grpc.dynamic_ssl_server_credentials(
            self._grpc_configuration(),
            followed.renewed,  # type: ignore[arg-type]  # None: as before
            require_client_authentication=self.client_ca is not None,
        )

    def _grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        self.ssl_context()  # whose complaints are better
        authorities = None if self.client_ca is None else self.client_ca.read_bytes()
        pair = (self.key.read_bytes(), self.cert.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authorities)

    @property
    def _files(self) -> Sequence[Path]:
        return (self.cert, self.key) if self.client_ca is None else (self.cert, self.key, self.client_ca)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """Which servers a client believes, and what it proves with who it is. All files are PEM.

    Attributes:
        ca: authorities, of one of which a server must have a certificate for the name it is called by.
        cert, key: a certificate of the client's own and the private key of it; None: it has none.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, ca: Path | None, cert: Path | None, key: Path | None) -> Self | None:
        """The settings `tls_ca`, `tls_client_cert` and `tls_client_key`; None where they are unset.

        ValueError says which setting is missing, or which file is at fault and why.
        """
        if (cert is None) != (key is None):
            raise ValueError("tls_client_cert and tls_client_key are needed, both of them or none")
        if ca is None:
            if cert is not None:
                raise ValueError("tls_client_cert needs tls_ca: which servers to show it to")
            return None
        tls = cls(ca=ca, cert=cert, key=key)
        tls.extend(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        return tls

    def extend(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """A context that trusts these authorities too, and has the certificate; ValueError for files of no use."""
        _load_authorities(context, self.ca)
        if self.cert is not None and self.key is not None:
            _load_pair(context, self.cert, self.key)
        return context

    def grpc_credentials(self) -> grpc.ChannelCredentials:
        """For channels of gRPC, which believe these authorities alone."""
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(),
            private_key=None if self.key is None else self.key.read_bytes(),
            certificate_chain=None if self.cert is None else self.cert.read_bytes(),
        )


class Followed(Generic[Made]):
    """What is made of files, made anew when they have changed.

    Files that can then not be used are told in the log once, and what was made before stays.

    Args:
        make: reads the files; raises ValueError or OSError where it cannot use them.
    """

    def __init__(self, files: Sequence[Path], make: Callable[[], Made]) -> None:
        self._files = files
        self._make = make
        self._stamps = self._look()

    def renewed(self) -> Made | None:
        """What they make now, where they have changed since the last look; otherwise None."""
        stamps = self._look()
        if stamps == self._stamps:
            return None
        # Before they are read: what is written meanwhile has other stamps, and is read next time.
        self._stamps = stamps
        try:
            made = self._make()
        except (ValueError, OSError) as error:
            _log.error("changed certificates are of no use, the former ones stay", cause=str(error))
            return None
        _log.info("changed certificates are used from now on", files=" ".join(map(str, self._files)))
        return made

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._files]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does, also where a link to it is moved; None: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    for path in (cert, key):
        _check_readable(path)
    try:
        # A key with a password would be asked for at the terminal.
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"the private key in {key} is not that of the certificate in {cert}") from None
        raise ValueError(
            f"{cert} and {key} must be a certificate and its private key as PEM, the key without a password"
        ) from None


def _load_authorities(context: ssl.SSLContext, ca: Path) -> None:
    _check_readable(ca)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError:
        raise ValueError(f"there is no certificate as PEM in {ca}") from None


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
