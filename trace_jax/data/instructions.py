"""Task prompts (paper, supplement Fig. 5) and M-BEIR's rules for texts and instructions."""

_MODALITY = {
    (True, False): "a text",
    (False, True): "an image",
    (True, True): "an image with a text",
}
_ATTEND = {
    (True, False): "the things, people, relations and facts that the text names or implies",
    (False, True): "the things, people and details that the image shows",
    (True, True): "how the text refers to the image: what it asks about it, or what it changes and what it keeps",
}


def assistant_prompt(style: str) -> str:
    """The system turn of plain conversation, as in the generative pretraining: Qwen's default, or a word."""
    return "Answer." if style == "short" else "You are a helpful assistant."


def query_prompt(style: str, has_text: bool, has_image: bool) -> str:
    """The system turn of a query. `style` is "paper" (role, what to attend to, when to reason) or "short"."""
    if style == "short":
        return "Query."
    kind = (has_text, has_image)
    return (
        f"You are a retrieval assistant. The query is {_MODALITY[kind]}. Attend to {_ATTEND[kind]}. If the query is"
        " simple, output only <|emb|>. If it is complex, first describe the target concisely, then output <|emb|>."
        " Write nothing after <|emb|>."
    )


def document_prompt(style: str, has_text: bool, has_image: bool) -> str:
    """The system turn of a candidate, which is never reasoned about."""
    if style == "short":
        return "Document."
    return (
        f"You are a retrieval assistant. The candidate is {_MODALITY[has_text, has_image]}. Capture its subject and"
        " its details in one embedding. Output only <|emb|>."
    )


def format_string(text: str | None) -> str:
    """M-BEIR's text rule: no carriage returns, no outer quotes, a capital first, a full stop last; "" stays ""."""
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def format_query(instruction: str, text: str) -> str:
    """M-BEIR's query text: the instruction as a sentence, then the query."""
    return format_string(f"{format_string(instruction)} {text or ''}")
