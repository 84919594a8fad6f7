"""The tokenizer in threads of its own, off the event loop.

The ``tokenizers`` library is used directly: importing transformers would cost the
router seconds at start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from tokenizers import Tokenizer

from lorax_contract.errors import LoraxError, OverloadedError, StartupError, ValidationError
from lorax_contract.exit_codes import ExitCode
from lorax_router.service.prompts.encoding import EncodedText, TextToEncode, encode, encode_plain

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# Characters from which on a text is a job of its own: others would wait for it.
_LONG = 8192
# What is tokenized to see that something is.
_PROBE = TextToEncode("a", add_special_tokens=False)


class TokenSpan(NamedTuple):
    """One token of a text; ``start`` and ``stop`` count characters of it."""

    id: int
    text: str
    start: int
    stop: int


def load_tokenizer(tokenizer_dir: str) -> Tokenizer:
    """Read ``tokenizer.json`` of a folder; raises StartupError in words."""
    path = Path(tokenizer_dir) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for all that can go wrong
        reason = "there is no such file" if not path.is_file() else str(error)
        raise StartupError(
            f"the tokenizer {path} cannot be read: {reason}", ExitCode.TOKENIZER_UNUSABLE
        ) from error
    # The file may bring settings of its training; lengths are the validator's affair.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class _Asked(NamedTuple):
    """Texts, and who waits for their tokens."""

    text: TextToEncode
    answer: asyncio.Future[EncodedText]


class TokenizerPool:
    """Runs tokenizer work in ``num_workers`` threads; at most ``max_pending`` calls wait."""

    def __init__(self, tokenizer: Tokenizer, num_workers: int, max_pending: int = 4096) -> None:
        self.tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenizer")
        self._max_pending = max_pending
        self._num_pending = 0
        self._num_workers = num_workers
        # Texts that came since the loop last looked; what comes together is tokenized together.
        self._asked: list[_Asked] = []
        # Set when a thread has done something next; another one takes its place then.
        self._progress = asyncio.Event()
        self._is_probing = False

    async def encode(self, asked: TextToEncode) -> EncodedText:
        """Return the tokens of texts; raises ValidationError when they cannot be tokenized."""
        self._check_pending()
        self._num_pending += 1
        loop = asyncio.get_running_loop()
        waiting = _Asked(asked, loop.create_future())
        if not self._asked:
            loop.call_soon(self._hand_out, loop)
        self._asked.append(waiting)
        try:
            return await waiting.answer
        finally:
            self._num_pending -= 1

    def _hand_out(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the threads what was asked for: long texts one by one, others in even parts."""
        asked = [each for each in self._asked if not each.answer.done()]
        self._asked = []
        long = [[each] for each in asked if len(each.text.text) > _LONG]
        others = [each for each in asked if len(each.text.text) <= _LONG]
        parts = [others[start :: self._num_workers] for start in range(self._num_workers)]
        for part in filter(None, (*parts, *long)):
            texts = [each.text for each in part]
            try:
                job = loop.run_in_executor(
                    self._threads, partial(self._guarded, loop, _encode_all, self.tokenizer, texts)
                )
            except RuntimeError as error:
                # The threads are closed.
                for each in part:
                    each.answer.set_exception(error)
            else:
                job.add_done_callback(partial(_deliver, part))

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[TokenSpan]:
        """Return the tokens of a text with their places in it; raises ValidationError."""
        return await self.run(partial(self._tokenize, text, add_special_tokens))

    async def run(self, function: Callable[..., Result], *args: object) -> Result:
        """Run a function in one of the threads; raises OverloadedError when too many wait."""
        self._check_pending()
        self._num_pending += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._threads, partial(self._guarded, loop, function, *args)
            )
        finally:
            self._num_pending -= 1

    def _check_pending(self) -> None:
        if self._num_pending >= self._max_pending:
            raise OverloadedError("too many texts wait for the tokenizer", public="")

    async def progress(self) -> None:
        """Return once a thread has done something: what others want, or else a word of its own.

        That never comes while all threads are stuck; how long they are busy does not matter.
        """
        progress = self._progress
        if not self._is_probing:
            # One at a time: those who ask again and again fill no queue.
            self._is_probing = True
            loop = asyncio.get_running_loop()
            self._threads.submit(self._guarded, loop, _encoded, self.tokenizer, _PROBE)
        await progress.wait()

    def close(self) -> None:
        """Let running calls end and drop those that wait."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _guarded(
        self, loop: asyncio.AbstractEventLoop, function: Callable[..., Result], *args: object
    ) -> Result:
        """Call a function, and say that something was done."""
        try:
            return _in_own_words(function, *args)
        finally:
            with contextlib.suppress(RuntimeError):
                # The loop may have ended meanwhile.
                loop.call_soon_threadsafe(self._on_progress)

    def _on_progress(self) -> None:
        self._is_probing = False
        self._progress.set()
        self._progress = asyncio.Event()

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[TokenSpan]:
        with _in_words():
            encoding = self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        return [
            TokenSpan(token_id, text[start:stop], start, stop)
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]


def _deliver(asked: list[_Asked], job: asyncio.Future[list[EncodedText | LoraxError]]) -> None:
    """Give each what became of its text; who waits no longer gets nothing."""
    waiting = [each.answer for each in asked]
    if job.cancelled():
        for answer in waiting:
            answer.cancel()
        return
    failure = job.exception()
    for number, answer in enumerate(waiting):
        if answer.done():
            continue
        found = failure or job.result()[number]
        if isinstance(found, BaseException):
            answer.set_exception(found)
        else:
            answer.set_result(found)


def _encode_all(
    tokenizer: Tokenizer, asked: Sequence[TextToEncode]
) -> list[EncodedText | LoraxError]:
    """Return the tokens of each of some texts, or what is wrong with it."""
    made: dict[int, EncodedText] = {}
    for adds in (True, False):
        places = [
            place
            for place, each in enumerate(asked)
            if each.is_plain and each.add_special_tokens == adds
        ]
        if not places:
            continue
        # Which of them cannot be tokenized is seen when each is alone.
        with contextlib.suppress(BaseException):
            texts = [asked[place].text for place in places]
            found = encode_plain(tokenizer, texts, add_special_tokens=adds)
            made.update(zip(places, found, strict=True))
    return [made.get(place) or _encode_one(tokenizer, each) for place, each in enumerate(asked)]


def _encode_one(tokenizer: Tokenizer, asked: TextToEncode) -> EncodedText | LoraxError:
    try:
        return _in_own_words(_encoded, tokenizer, asked)
    except LoraxError as error:
        return error


def _in_own_words(function: Callable[..., Result], *args: object) -> Result:
    """Call a function; a panic of the Rust library, no Exception, becomes an error like others."""
    try:
        return function(*args)
    except Exception:
        raise
    except BaseException as error:
        raise LoraxError(f"the tokenizer library failed: {error}", public="") from error


def _encoded(tokenizer: Tokenizer, asked: TextToEncode) -> EncodedText:
    with _in_words():
        return encode(tokenizer, asked)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logger.warning("a text could not be tokenized: %s", type(error).__name__)
        raise ValidationError("`inputs` cannot be tokenized by this model's tokenizer") from error
