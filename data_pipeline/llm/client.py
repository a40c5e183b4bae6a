"""One request to an OpenAI-compatible server through the `openai` package, and what came of it.

The answer is bounded in bytes and time (`connection.py`) and checked (`completion.py`).
"""

from data_pipeline.llm.completion import AnswerReader, Request
from data_pipeline.llm.connection import CallError, Connection
from data_pipeline.llm.ledger import Answer
from data_pipeline.llm.prices import Price
from data_pipeline.llm.secrets import Redactor, Secret
from data_pipeline.llm.transport import MAX_BODY_BYTES, BaseUrl


class Client:
    """Asks one server; used as an asynchronous context manager.

    Args:
        base: where it is.
        key: the API key.
        price: of its model.
        redact: keeps keys out of what the server sends back.
        deadline: seconds that one answer may take, from the first byte to the last.
        connections: how many to keep open.
        max_body: longest answer in bytes.
    """

    def __init__(
        self,
        base: BaseUrl,
        key: Secret | None,
        price: Price,
        redact: Redactor,
        *,
        deadline: float = 300.0,
        connections: int = 16,
        max_body: int = MAX_BODY_BYTES,
    ) -> None:
        self.base = base
        self.price = price
        self._reader = AnswerReader(price, redact)
        self._connection = Connection(
            base, key, redact, deadline=deadline, connections=connections, max_body=max_body
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._connection.close()

    def most(self, request: Request) -> int:
        """The most that a request can cost, in 1e-9 dollars."""
        return self.price.nano_dollars(request.prompt_bound, request.max_tokens)

    async def ask(self, request: Request) -> Answer:
        """Ask once.

        Raises:
            CallError: no usable answer; says whether to ask again.
            RunError: no request can succeed, see `Connection.call`.
        """
        body = request.body(self.base)
        model, messages = body.pop("model"), body.pop("messages")
        answered = await self._connection.call(
            lambda client: client.chat.completions.with_raw_response.create(
                model=model,
                messages=messages,
                extra_body=body,
                # Servers that know the header charge a repeated request once.
                extra_headers={"Idempotency-Key": request.key},
            )
        )
        try:
            return self._reader.parse(answered, request.bounds)
        except CallError as error:
            raise (self._connection.run_error(error) if error.final else error) from None
