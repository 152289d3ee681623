"""A request's prompt to tokens, and the checks that need the tokenizer: all before anything runs."""

from __future__ import annotations

from typing import Any

from core.data.chat import TooLong, prompt_ids, text_prompt_ids
from service.engines.base import BadRequest, ContextLengthExceeded, Request


def encode(request: Request, tokenizer: Any, context: int) -> list[int]:
    """Tokens of the prompt: the chat template with its opening of an answer, or the plain text.

    Args:
        request: what was asked.
        tokenizer: of the base.
        context: tokens that prompt and answer may have together.

    Returns:
        Token ids, at least one.

    Raises:
        EngineError: 400 if there is no template, it refuses the messages, nothing is left, or it is far too long.
    """
    try:
        return _encode(request, tokenizer, context)
    except TooLong as error:
        wanted = request.sampling.max_tokens
        raise ContextLengthExceeded(context, error.tokens, wanted, more=True) from None


def _encode(request: Request, tokenizer: Any, context: int) -> list[int]:
    if isinstance(request.prompt, str):
        try:
            ids = text_prompt_ids(request.prompt, tokenizer, most=context)
        except TooLong:
            raise
        except (ValueError, TypeError):  # a lone surrogate is no text in UTF-8
            raise BadRequest("invalid_prompt", "The prompt is not valid Unicode text.", param="prompt") from None
        if not ids:
            raise BadRequest("empty_prompt", "The prompt has no tokens: give some text.", param="prompt")
        return ids
    if not tokenizer.chat_template:
        message = "This model has no chat template: use /v1/completions, or a model with one."
        raise BadRequest("no_chat_template", message, param="model")
    try:
        ids = prompt_ids(request.prompt, tokenizer, most=context)
    except TooLong:
        raise
    except Exception as error:  # a template is text from a model: whatever it does is an answer, not a crash
        message = f"The model's chat template refused the messages: {str(error)[:300] or type(error).__name__}"
        raise BadRequest("chat_template_error", message, param="messages") from None
    if not ids:
        raise BadRequest("empty_prompt", "The messages have no tokens under this model's template.", param="messages")
    return ids


def limit(request: Request, prompt_tokens: int, context: int, default: int) -> int:
    """The most tokens that a request may generate.

    Args:
        request: what was asked.
        prompt_tokens: tokens of its prompt.
        context: tokens that prompt and answer may have together.
        default: the bound where the request gives none.

    Returns:
        At least 1.

    Raises:
        ContextLengthExceeded: if the prompt, with ``max_tokens`` or one token, does not fit.
    """
    wanted = request.sampling.max_tokens
    if prompt_tokens + (wanted or 1) > context:
        raise ContextLengthExceeded(context, prompt_tokens, wanted)
    return wanted if wanted is not None else min(default, context - prompt_tokens)
