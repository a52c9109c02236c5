"""The guard before all routes: asks for the credential that the table of policies demands."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import hdrs, web
from weightsync.orchestrator.daemon.access.credentials import Credentials
from weightsync.orchestrator.daemon.access.door import SMALL_BYTES
from weightsync.orchestrator.daemon.access.policy import policy_of
from weightsync.orchestrator.daemon.access.refusals import Refusals
from weightsync.orchestrator.daemon.access.tls import credential_of_peer
from weightsync.orchestrator.settings.credentials import Credential

CREDENTIAL: Final = "weightsync.credential"
"""In the match_info of a request that was let in: its credential as text. No pattern of a path has such a name."""

NO_CERTIFICATE: Final = "this needs a client certificate that names its role"

TOO_MUCH: Final = "others have not yet read what they asked for, and there is no room for more; ask again\n"

_SCHEME: Final = "bearer "

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Guard:
    """Lets requests through to their handler, or answers them.

    Attributes:
        let_in: told of each connection whose request bears a credential that serves.
        answers: asked whether an answer of so many bytes may be sent there.
    """

    def __init__(self, credentials: Credentials, refusals: Refusals, wants_certificates: bool = False) -> None:
        self._credentials, self._refusals, self._wants_certificates = credentials, refusals, wants_certificates
        self.let_in: Callable[[asyncio.Transport | None], None] = lambda _: None
        self.answers: Callable[[asyncio.Transport | None, int], bool] = lambda _, size: True

    def install(self, app: web.Application) -> None:
        """Stand before all routes of ``app``."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                answer = self._refused(request) or await handler(request)
            except web.HTTPException as error:
                _only_one(request, error)
                raise
            _only_one(request, answer)
            return self._bounded(request, answer)

        app.middlewares.append(guard)

    def _bounded(self, request: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
        """``answer``, or one that says that too much lies unread already. Who has read a large one is done."""
        body = answer.body if isinstance(answer, web.Response) else None
        size = len(body) if isinstance(body, bytes | bytearray) else 0
        if self.answers(request.transport, size):
            if size > SMALL_BYTES:
                answer.force_close()
            return answer
        self._refusals.say("too large an answer", remote=request.remote, path=request.path[:100], size=size)
        return web.Response(status=503, text=TOO_MUCH, headers={"Retry-After": "2"})

    def _refused(self, request: web.Request) -> web.Response | None:
        """The answer to a request that may not go on to its handler."""
        match = request.match_info
        if match.http_exception is not None:
            return None  # there is no such route, or not by this method, which aiohttp's own handler says
        policy = policy_of(match.route)
        if policy in ("public", "proven"):
            return None
        bearer, certificate = self._bearer(request), credential_of_peer(request)
        if self._wants_certificates and certificate is None:
            return self._refuse(request, 403, NO_CERTIFICATE)
        if bearer is None and (certificate is None or hdrs.AUTHORIZATION in request.headers):
            return self._refuse(request, 401, "wrong or missing token")
        credential = bearer or certificate
        assert credential is not None
        if certificate is not None and not certificate.agrees(credential):
            what = f"the token is that of {credential}, and the certificate that of {certificate}"
            return self._refuse(request, 403, what)
        if certificate is not None and certificate.name:
            credential = certificate
        if policy is None or credential.role not in policy:
            wanted = " or ".join(sorted(policy or ())) or "nobody"
            what = f"this needs the credential of role {wanted}, and this one is of role {credential.role}"
            return self._refuse(request, 403, what)
        match[CREDENTIAL] = str(credential)
        self.let_in(request.transport)
        return None

    def _bearer(self, request: web.Request) -> Credential | None:
        header = request.headers.get(hdrs.AUTHORIZATION, "")
        is_bearer = header[: len(_SCHEME)].lower() == _SCHEME  # RFC 9110 §11.1: in any case
        return self._credentials.of_bearer(header[len(_SCHEME) :].strip()) if is_bearer else None

    def _refuse(self, request: web.Request, status: int, text: str) -> web.Response:
        kind = "request turned away: wrong or missing token" if status == 401 else "request turned away: wrong role"
        self._refusals.say(kind, remote=request.remote, path=request.path[:100], reason=text)
        headers = {hdrs.WWW_AUTHENTICATE: "Bearer"} if status == 401 else {}
        return web.Response(status=status, text=f"{text}\n", headers=headers)


def _only_one(request: web.Request, answer: web.StreamResponse) -> None:
    """Whoever shows no credential has one request of each connection: connections are what is counted."""
    if CREDENTIAL not in request.match_info and not answer.prepared:
        answer.force_close()
