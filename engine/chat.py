"""Conversations in a model's own chat format: text, token ids, labels and prompts.

The text is what the tokenizer's chat template makes of the turns. What the loss counts is found by token, so a template
needs no marks for it: of every answer the tokens from the place where the model goes on to the end of its turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine import files, models
from engine.reading import check_text, read_pair
from helpers import Example, RecipeError, encode, parse_row

Turns = Sequence[Mapping[str, str]]  # role ("system", "user" or "assistant") and content


def load(name: str, revision: str = "") -> list[Turns]:
    """The conversations of a data set, whatever its form, with the system text of a column `system`; prints which forms
    were read. RecipeError names the row that holds none, or no text.
    """
    chats, forms = [], Counter()
    for place, row in files.read_rows(name, revision):
        parsed = parse_row(row)
        forms[read_pair(place, parsed)[0]] += 1  # or it says what is wrong with the row
        texts = [{"role": turn["role"], "content": turn.get("content")} for turn in parsed.turns]
        if row.get("system") and not any(turn["role"] == "system" for turn in texts):
            texts.insert(0, {"role": "system", "content": row["system"]})
        for number, turn in enumerate(texts, start=1):
            turn["content"] = check_text(f"{place}: turn {number}", turn["content"], or_number=True)
        chats.append(texts)
    files.print_forms(name, forms)
    return chats


def tidy(turns: Turns) -> list[dict[str, str]]:
    """Turns as chat templates take them: a system text, then user and assistant in turn.

    What the assistant says before the first question is dropped, and so is a question without an answer at the end;
    turns of the same role in a row are joined by an empty line. Other roles raise RecipeError.
    """
    tidied: list[dict[str, str]] = []
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if role not in ("system", "user", "assistant"):
            raise RecipeError(f"it holds a turn of the role {role!r}")
        if role == "assistant" and not any(before["role"] == "user" for before in tidied):
            continue
        if tidied and tidied[-1]["role"] == role:
            tidied[-1]["content"] += f"\n\n{content}"
        else:
            tidied.append({"role": role, "content": content})
    while tidied and tidied[-1]["role"] != "assistant":
        tidied.pop()
    if not tidied:
        raise RecipeError("it holds no answer to a question")
    return tidied


def without_system(turns: Turns) -> list[dict[str, str]]:
    """The turns with a system text put before the first question, for templates that refuse one."""
    if turns[0]["role"] != "system":
        return list(map(dict, turns))
    (system, question), rest = turns[:2], turns[2:]
    return [{"role": "user", "content": f"{system['content']}\n\n{question['content']}"}, *map(dict, rest)]


def render(tokenizer: PreTrainedTokenizerBase, turns: Turns, answer_follows: bool = False) -> str:
    """The text of turns; with `answer_follows` up to where the model goes on. Thinking is switched off."""
    options = {"tokenize": False, "add_generation_prompt": answer_follows, "enable_thinking": False}
    return tokenizer.apply_chat_template(list(turns), **options)


def prepare(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Make a tokenizer's chat template ready for training and answering; returns whether it takes a system text.

    White space around the template, which would become text, is dropped. RecipeError without a template.
    """
    if not tokenizer.chat_template:
        raise RecipeError('the tokenizer has no chat template: set text_format = "2024", or name another model')
    if isinstance(tokenizer.chat_template, Mapping):  # several by name
        tokenizer.chat_template = tokenizer.chat_template.get("default", "")
    tokenizer.chat_template = tokenizer.chat_template.strip()
    try:
        turns = [{"role": "system", "content": "印システム印"}, {"role": "user", "content": "こんにちは"}]
        return "印システム印" in render(tokenizer, turns)
    except TemplateError:
        return False


def load_tokenizer(sources: Mapping[str, Mapping[str, Any]]) -> PreTrainedTokenizerBase:
    """The tokenizer, with its chat template, of the adapter of these `sources` (see `records.find_models`), or of the
    model where there is no adapter or none was saved with it. Without an adapter it ends turns as a training would.
    """
    for source in (sources.get("adapter"), sources["model"]):
        with suppress(RecipeError):
            if source:
                tokenizer = models.load_tokenizer(source["name"], source["commit"])
                break
    else:
        raise RecipeError(f"{sources['model']['name']}: its tokenizer cannot be used")
    prepare(tokenizer)
    if not sources.get("adapter"):
        name, commit = sources["model"]["name"], sources["model"]["commit"]
        _, config = models.read_configs(name, commit, 0)
        try:
            settle_end(tokenizer, models.score_matrix(name, commit, config), "chat")
        except RecipeError as error:  # it may answer all the same
            print(error)
    return tokenizer


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of all control tokens, such as <eos> or <start_of_turn>, by text; some models have thousands."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def to_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The token ids of a rendered text, as a server reads it, and where each begins; with the one <bos> in front if the
    tokenizer has one and the template does not write it.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = found["input_ids"], [start for start, _ in found["offset_mapping"]]
    begin = encode(tokenizer, "").ids
    return (ids, starts) if ids[: len(begin)] == begin else (begin + ids, [0] * len(begin) + starts)


def example(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, system: bool = True, controls: Mapping[str, int] | None = None
) -> Example:
    """A conversation as the trainer gets it: all its turns, with a loss on every answer and the end of its turn.

    Without `system` a system text goes before the first question. `controls` are the tokenizer's control tokens, where
    the caller has them. RecipeError says why a conversation cannot be used.
    """
    turns = tidy(turns) if system else without_system(tidy(turns))
    controls = control_tokens(tokenizer) if controls is None else controls
    for number, turn in enumerate(turns, start=1):
        if held := next((token for token in controls if token in turn["content"]), ""):
            raise RecipeError(f"turn {number} holds the control token {held}, which would end or begin a turn")
    try:
        text = render(tokenizer, turns)
        ends = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = [(render(tokenizer, turns[:n], True), render(tokenizer, turns[: n + 1])) for n in ends]
    except TemplateError as error:
        raise RecipeError(f"the chat template refuses it ({error})") from None
    place = 0
    for number, turn in enumerate(turns, start=1):
        place = text.find(turn["content"].strip(), place)
        if place < 0:
            raise RecipeError(f"the chat template drops or changes the text of turn {number}")
        place += len(turn["content"].strip())
    if not all(text.startswith(before) and text.startswith(after) for before, after in spans):
        raise RecipeError("the chat template writes earlier turns otherwise once others follow")
    ids, starts = to_ids(tokenizer, text)
    special, labels = set(controls.values()), [-100] * len(ids)
    for before, after in spans:
        inside = [n for n, start in enumerate(starts) if len(before) <= start < len(after)]
        last = max((n for n in inside if ids[n] in special), default=None)
        if last is None:
            raise RecipeError("the chat template puts no end token behind an answer")
        labels[inside[0] : last + 1] = ids[inside[0] : last + 1]
    begin = tokenizer.bos_token_id
    if ids[:2] == [begin, begin] or (begin != tokenizer.eos_token_id and ids.count(begin) > 1):
        raise RecipeError("it holds a second <bos>")
    return Example(text, ids, labels, sum(start < len(spans[0][0]) for start in starts))


def examples(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Turns]) -> tuple[list[Example], dict[int, str]]:
    """The conversations that can be trained on, and by number (from 0) why others cannot; RecipeError if none can."""
    system, found, problems = prepare(tokenizer), [], {}
    controls = control_tokens(tokenizer)
    folded = sum(not system and any(turn["role"] == "system" for turn in turns) for turns in chats)
    if folded:
        print(f"{folded:,} system texts stand before the first question, because the chat template refuses them")
    for number, turns in enumerate(tqdm(chats, unit="conversation", mininterval=1)):
        try:
            found.append(example(tokenizer, turns, system, controls))
        except RecipeError as error:
            problems[number] = str(error)
    if not found:
        raise RecipeError(f"no conversation can be trained on; the first one: {next(iter(problems.values()), 'none')}")
    return found, problems


def prompt_ids(tokenizer: PreTrainedTokenizerBase, instruction: str, shots: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a question in the chat format; `shots` (instruction, response) are earlier turns, the first one, the
    most similar, next to the question. Control tokens that a text speaks of are written without their first sign.
    """
    turns = []
    for shot in reversed(list(shots)):
        turns += [{"role": "user", "content": shot["instruction"]}, {"role": "assistant", "content": shot["response"]}]
    turns.append({"role": "user", "content": instruction})
    controls = control_tokens(tokenizer)
    for turn in turns:
        for token in controls:
            turn["content"] = turn["content"].replace(token, token[1:])
    try:
        return to_ids(tokenizer, render(tokenizer, turns, True))[0]
    except TemplateError as error:
        raise RecipeError(f'prompt_style = "chat": the chat template refuses {len(turns)} turns ({error})') from None


def settle_end(tokenizer: PreTrainedTokenizerBase, matrix: torch.Tensor | None, text_format: str) -> None:
    """See that a base can write what answers end with, and let a chat template's turns end with <eos> where it cannot.

    `matrix` (vocabulary, width) turns hidden states into scores (see `models.score_matrix`). LoRA leaves it as it is,
    so where many tokens have nearly the same row, the model writes any of them. RecipeError if no end is left.
    """
    last = tokenizer.eos_token_id
    ends = [last] if text_format == "2024" else ends_of_turn(tokenizer)
    names = ", ".join(tokenizer.convert_ids_to_tokens(ends))
    if matrix is None:
        return print(f"whether this base has learnt {names} cannot be read from its checkpoint")
    if max(last, *ends) >= len(matrix):
        raise RecipeError(f"the tokenizer has tokens that the model has not, such as {names}: name another model")
    unknown = [token for token in ends if not is_known(matrix, token)]
    if not unknown:
        return
    if text_format == "2024":
        return print(f"this base has not learnt {names}, with which texts end: few answers will end by themselves")
    for token in tokenizer.convert_ids_to_tokens(unknown):
        tokenizer.chat_template = tokenizer.chat_template.replace(token, tokenizer.eos_token)
    last_known = last not in unknown and is_known(matrix, last)
    if not last_known or not set(unknown).isdisjoint(ends_of_turn(tokenizer)):
        advice = "name the instruct model that the template belongs to"
        advice += ', or set text_format = "2024"' if last_known else ""
        raise RecipeError(f"this base has not learnt {names}, with which answers end in its chat template: {advice}")
    print(f"this base has not learnt {names}: turns end with {tokenizer.eos_token} instead")


def is_known(matrix: torch.Tensor, token: int) -> bool:
    """Whether a token has a row of its own in a matrix (vocabulary, width): its third neighbour and the mean of all lie
    further than a quarter of the usual distance. RecipeError for what is no number.

    In Gemma 3 270M the third lies at 0.08 of it for <end_of_turn>, and at 0.28 or more for 149 of 150 tokens of texts.
    At the mean lies a token that was added without a training: its score is never the highest.
    """
    parts, own = matrix.split(2**15), matrix[token].float()
    distances = torch.cat([(rows.float() - own).norm(dim=1) for rows in parts])
    mean = torch.stack([rows.float().sum(0) for rows in parts]).sum(0) / len(matrix)
    if distances.isnan().any():
        raise RecipeError("the weights of this base are damaged: fetch them again")
    ordered = distances.sort().values
    near = min(ordered[min(3, len(ordered) - 1)], (own - mean).norm())
    return bool(near > ordered[int(0.9 * (len(ordered) - 1))] / 4)


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the control tokens that a chat template writes at the end of an answer, in their order."""
    prepare(tokenizer)
    turns = [{"role": "user", "content": "山"}, {"role": "assistant", "content": "川"}]
    controls = control_tokens(tokenizer)
    special = set(controls.values())
    return [label for label in example(tokenizer, turns, controls=controls).labels if label in special]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token with which the chat template ends an answer."""
    return ends_of_turn(tokenizer)[-1]


def end_at_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model's answers end at the end of a turn, too."""
    config: Any = model.generation_config
    config.eos_token_id = sorted({*config.eos_token_id, end_of_turn(tokenizer)})
