"""Questions over one-table schemas with the SQL query that answers each, generated from a seed.

Every query is executed in sqlite3, on two databases made for its question: on at least one of them each slightly
wrong query (another column, a condition left out, another operator or aggregate, the other order) gives another
result. An answer is right when its result equals the reference's on both. Tables, columns and the words in the
values of the held-out part do not occur in the training part; the ways of asking do.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from demo_sql_words import Column, Theme, ValuePools, load_themes

STOP = "[/assistant]"
MAX_STEPS_OF_A_QUERY = 200_000
_NUM_ROWS = 12
_COMPARED = {
    ">": ("more than", "above", "greater than", "over"),
    "<": ("less than", "below", "smaller than", "under"),
}
_AGGREGATES = {
    "MAX": ("highest", "maximum", "largest"),
    "MIN": ("lowest", "minimum", "smallest"),
    "AVG": ("average", "mean"),
    "SUM": ("total", "sum of the"),
}

Value = str | int
Row = tuple[Value, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """`column operator value`."""

    column: Column
    operator: str
    value: Value

    def __str__(self) -> str:
        value = f'"{self.value}"' if isinstance(self.value, str) else self.value
        return f"{self.column.name} {self.operator} {value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query in parts, so that wrong neighbours of it can be made."""

    select: tuple[str, ...]
    table: str
    conditions: tuple[Condition, ...] = ()
    tail: str = ""

    def __str__(self) -> str:
        where = f" WHERE {' AND '.join(map(str, self.conditions))}" if self.conditions else ""
        tail = f" {self.tail}" if self.tail else ""
        return f"SELECT {', '.join(self.select)} FROM {self.table}{where}{tail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question, its schema, the reference query, and two databases that tell right from wrong."""

    kind: str
    schema: str
    text: str
    query: str
    databases: tuple[tuple[Row, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlSplit:
    """`train` shares no table, column set or value with `dev` and `test`."""

    train: tuple[Question, ...]
    dev: tuple[Question, ...]
    test: tuple[Question, ...]


def prompt(question: Question) -> str:
    """Return the prompt that the SQL adapter was trained on."""
    return (
        "[user] Write a SQL query to answer the question based on the table schema.\n\n "
        f"context: {question.schema}\n\n question: {question.text} [/user] [assistant]"
    )


def generate(seed: int, *, num_train: int, num_dev: int, num_test: int) -> SqlSplit:
    """Generate the three parts; one seed always gives the same questions."""
    train = _questions(random.Random(f"train {seed}"), "train", num_train)
    held_out = _questions(random.Random(f"test {seed}"), "held_out", num_dev + num_test)
    return SqlSplit(train=train, dev=held_out[:num_dev], test=held_out[num_dev:])


def one_of_each_kind(questions: Sequence[Question]) -> list[Question]:
    """Return the first question of every kind."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(question.kind, question)
    return list(first.values())


def extract_query(text: str) -> str | None:
    """Return the first SQL query in a text, out of code fences and explanations, or None."""
    start = text.upper().find("SELECT")
    if start < 0:
        # An instruction may end in SELECT already, and then the answer begins after it.
        return f"SELECT {text.strip().split(';')[0].splitlines()[0]}" if text.strip() else None
    query = text[start:]
    for end in (";", "```", "\n\n", STOP, "[/user]"):
        query = query.split(end)[0]
    return query.strip()


def same_result(question: Question, query: str) -> bool:
    """Say whether a query gives the reference's result on both of the question's databases."""
    return all(
        _result(question, rows, query) == _result(question, rows, question.query) for rows in question.databases
    )


def _result(question: Question, rows: tuple[Row, ...], query: str) -> object:
    """Run a query; order counts only where the reference orders. None if the query fails."""
    fetched = _run(question.schema, rows, query)
    if fetched is None:
        return None
    rounded = [tuple(round(cell, 6) if isinstance(cell, float) else cell for cell in row) for row in fetched]
    return rounded if "ORDER BY" in question.query else Counter(rounded)


def _run(schema: str, rows: Sequence[Row], query: str) -> list[Row] | None:
    table = schema.split()[2]
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(schema)
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
        connection.commit()
        connection.execute("PRAGMA query_only = ON")
        connection.set_progress_handler(lambda: 1, MAX_STEPS_OF_A_QUERY)
        try:
            return connection.execute(query).fetchall()
        except (sqlite3.Error, sqlite3.Warning):
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A question before its databases exist."""

    text: str
    query: Query


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """One table to ask about, with the means to choose from it."""

    rng: random.Random
    pools: ValuePools
    table: str
    theme: Theme
    columns: tuple[Column, ...]

    def pick(self, *, numeric: bool | None = None, but: Sequence[Column] = ()) -> Column:
        """Choose a column; raises _DoesNotFit where the table has none of that sort left."""
        fitting = [c for c in self.columns if c not in but and (numeric is None or c.numeric == numeric)]
        if not fitting:
            raise _DoesNotFit
        return self.rng.choice(fitting)

    def pick_property(self) -> Column:
        """Choose a column of text that says something about a row and is not the row's own name."""
        return self.pick(numeric=False, but=[c for c in self.columns if c.name == self.theme.noun])

    def is_value(self, column: Column) -> Condition:
        return Condition(column=column, operator="=", value=self.pools.value(column, self.rng))

    def say(self, *forms: str, **words: object) -> str:
        return self.rng.choice(forms).format(noun=self.theme.noun, nouns=self.theme.table, **words)


class _DoesNotFit(Exception):
    """The table lacks a column that this kind of question needs."""


def _questions(rng: random.Random, part: str, count: int) -> tuple[Question, ...]:
    themes, pools = load_themes(part), ValuePools(held_out=part == "held_out")
    found: dict[str, Question] = {}
    kinds = list(_KINDS)
    while len(found) < count:
        kind = kinds[len(found) % len(kinds)]
        question = _try_question(rng, rng.choice(themes), pools, kind)
        if question is not None:
            found.setdefault(question.schema + question.text, question)
    questions = list(found.values())
    rng.shuffle(questions)
    return tuple(questions)


def _try_question(rng: random.Random, theme: Theme, pools: ValuePools, kind: str) -> Question | None:
    columns = rng.sample(theme.columns, k=rng.choice([2, 2, 3, 3, 4, 5]))
    table = f"table_name_{rng.randint(1, 99)}" if rng.random() < 0.5 else theme.table
    scene = _Scene(rng=rng, pools=pools, table=table, theme=theme, columns=tuple(columns))
    try:
        draft = _KINDS[kind](scene)
    except _DoesNotFit:
        return None
    schema = f"CREATE TABLE {table} ({', '.join(f'{c.name} {c.sql_type}' for c in columns)})"
    databases = tuple(_make_rows(scene, draft.query) for _ in range(2))
    question = Question(kind=kind, schema=schema, text=draft.text, query=str(draft.query), databases=databases)
    return question if _tells_right_from_wrong(question, draft.query, columns) else None


def _make_rows(scene: _Scene, query: Query) -> tuple[Row, ...]:
    """Fill a table in which every condition holds on some rows, and all of them together on some."""
    numbers = {c.name: scene.rng.sample(range(*c.span), k=_NUM_ROWS) for c in scene.columns if c.numeric}
    rows = []
    for position in range(_NUM_ROWS):
        row: list[Value] = []
        for column in scene.columns:
            if column.numeric:
                row.append(numbers[column.name][position])
            else:
                row.append(scene.pools.value(column, scene.rng))
        for index, condition in enumerate(c for c in query.conditions if c.operator == "="):
            if position % 4 in (0, index + 1):
                row[scene.columns.index(condition.column)] = condition.value
        rows.append(tuple(row))
    # Repeated values, so that counting groups or distinct values is no mere counting of rows.
    for position in range(1, _NUM_ROWS, 5):
        for index, column in enumerate(scene.columns):
            if not column.numeric and not any(c.column == column for c in query.conditions):
                rows[position] = (*rows[position][:index], rows[0][index], *rows[position][index + 1 :])
    return tuple(rows)


def _tells_right_from_wrong(question: Question, query: Query, columns: Sequence[Column]) -> bool:
    """Check that the reference has a result, and that no wrong neighbour shares it on both databases."""
    for rows in question.databases:
        result = _run(question.schema, rows, question.query)
        if not result or result[0][0] is None or result == [(0,)]:
            return False
    return not any(same_result(question, str(wrong)) for wrong in _wrong_neighbours(query, columns))


def _wrong_neighbours(query: Query, columns: Sequence[Column]) -> Iterator[Query]:
    for index in range(len(query.conditions)):
        yield replace(query, conditions=query.conditions[:index] + query.conditions[index + 1 :])
    for index, condition in enumerate(query.conditions):
        for operator in {"=", "<", ">"} - {condition.operator}:
            changed = replace(condition, operator=operator)
            yield replace(query, conditions=(*query.conditions[:index], changed, *query.conditions[index + 1 :]))
    for name in {c.name for c in columns} - set(query.select):
        yield replace(query, select=(name, *query.select[1:]))
    for aggregate in _AGGREGATES:
        for column in columns:
            changed_select = f"{aggregate}({column.name})"
            if column.numeric and changed_select not in query.select:
                yield replace(query, select=(changed_select, *query.select[1:]))
    if query.tail:
        yield replace(query, tail="")
    if "DESC" in query.tail:
        yield replace(query, tail=query.tail.replace("DESC", "ASC"))
    elif "ASC" in query.tail:
        yield replace(query, tail=query.tail.replace("ASC", "DESC"))


def _select_where(scene: _Scene) -> _Draft:
    wanted = scene.pick()
    condition = scene.is_value(scene.pick(numeric=False, but=[wanted]))
    forms = [
        "What is the {a} when the {b} is {v}?",
        "What {a} has a {b} of {v}?",
        "Which {a} has {v} as its {b}?",
        "Tell me the {a} for {b} of {v}",
        "What is the {a} of the {noun} with {b} {v}?",
        "Find the {a} where {b} is {v}.",
        "Name the {a} with {b} of {v}",
    ]
    if len(scene.columns) == 2:
        forms += [
            "Name the {a} for {v}",
            "What is the {a} of {v}?",
            "What is {v}'s {a}?",
            "Which {a} belongs to {v}?",
        ]
    text = scene.say(*forms, a=wanted.phrase, b=condition.column.phrase, v=condition.value)
    return _Draft(text=text, query=Query(select=(wanted.name,), table=scene.table, conditions=(condition,)))


def _select_where_two(scene: _Scene) -> _Draft:
    wanted = scene.pick()
    first = scene.is_value(scene.pick(numeric=False, but=[wanted]))
    second = scene.is_value(scene.pick(numeric=False, but=[wanted, first.column]))
    text = scene.say(
        "What is the {a} when the {b} is {v} and the {c} is {w}?",
        "Which {a} has a {b} of {v} and a {c} of {w}?",
        "Find the {a} where {b} is {v} and {c} is {w}.",
        "Name the {a} for {b} of {v} and {c} of {w}",
        a=wanted.phrase,
        b=first.column.phrase,
        v=first.value,
        c=second.column.phrase,
        w=second.value,
    )
    return _Draft(text=text, query=Query(select=(wanted.name,), table=scene.table, conditions=(first, second)))


def _select_two_columns(scene: _Scene) -> _Draft:
    condition = scene.is_value(scene.pick(numeric=False))
    first = scene.pick(but=[condition.column])
    second = scene.pick(but=[condition.column, first])
    text = scene.say(
        "What are the {a} and the {c} when the {b} is {v}?",
        "Show the {a} and {c} of each {noun} with {b} {v}.",
        "List the {a} and the {c} where {b} is {v}.",
        a=first.phrase,
        c=second.phrase,
        b=condition.column.phrase,
        v=condition.value,
    )
    return _Draft(
        text=text, query=Query(select=(first.name, second.name), table=scene.table, conditions=(condition,))
    )


def _select_compared(scene: _Scene) -> _Draft:
    number = scene.pick(numeric=True)
    wanted = scene.pick(but=[number])
    condition, words = _comparison(scene, number)
    text = scene.say(
        "Which {a} has a {n} {words} {k}?",
        "What is the {a} with {n} {words} {k}?",
        "List the {a} where the {n} is {words} {k}.",
        "Show the {a} of every {noun} with a {n} {words} {k}.",
        a=wanted.phrase,
        n=number.phrase,
        words=words,
        k=condition.value,
    )
    return _Draft(text=text, query=Query(select=(wanted.name,), table=scene.table, conditions=(condition,)))


def _count_where(scene: _Scene) -> _Draft:
    condition = scene.is_value(scene.pick_property())
    text = scene.say(
        "How many {nouns} have a {b} of {v}?",
        "How many {nouns} are there when the {b} is {v}?",
        "Count the {nouns} whose {b} is {v}.",
        "What is the number of {nouns} with {b} {v}?",
        b=condition.column.phrase,
        v=condition.value,
    )
    return _Draft(text=text, query=Query(select=("COUNT(*)",), table=scene.table, conditions=(condition,)))


def _count_compared(scene: _Scene) -> _Draft:
    number = scene.pick(numeric=True)
    condition, words = _comparison(scene, number)
    text = scene.say(
        "How many {nouns} have a {n} {words} {k}?",
        "Count the {nouns} with {n} {words} {k}.",
        "What is the number of {nouns} whose {n} is {words} {k}?",
        n=number.phrase,
        words=words,
        k=condition.value,
    )
    return _Draft(text=text, query=Query(select=("COUNT(*)",), table=scene.table, conditions=(condition,)))


def _aggregate(scene: _Scene) -> _Draft:
    number = scene.pick(numeric=True)
    function, word = _aggregation(scene)
    text = scene.say(
        "What is the {word} {n}?",
        "Find the {word} {n} of all {nouns}.",
        "Tell me the {word} {n}",
        word=word,
        n=number.phrase,
    )
    return _Draft(text=text, query=Query(select=(f"{function}({number.name})",), table=scene.table))


def _aggregate_where(scene: _Scene) -> _Draft:
    number = scene.pick(numeric=True)
    condition = scene.is_value(scene.pick(numeric=False))
    function, word = _aggregation(scene)
    text = scene.say(
        "What is the {word} {n} when the {b} is {v}?",
        "What is the {word} {n} for {b} of {v}?",
        "Find the {word} {n} where {b} is {v}.",
        "Name the {word} {n} of {nouns} with {b} {v}",
        word=word,
        n=number.phrase,
        b=condition.column.phrase,
        v=condition.value,
    )
    return _Draft(
        text=text, query=Query(select=(f"{function}({number.name})",), table=scene.table, conditions=(condition,))
    )


def _first_of_order(scene: _Scene) -> _Draft:
    number = scene.pick(numeric=True)
    wanted = scene.pick(but=[number])
    direction, words = scene.rng.choice(
        [("DESC", ("highest", "largest", "most")), ("ASC", ("lowest", "smallest", "least"))]
    )
    text = scene.say(
        "Which {a} has the {word} {n}?",
        "What is the {a} of the {noun} with the {word} {n}?",
        "Name the {a} with the {word} {n}",
        a=wanted.phrase,
        n=number.phrase,
        word=scene.rng.choice(words),
    )
    tail = f"ORDER BY {number.name} {direction} LIMIT 1"
    return _Draft(text=text, query=Query(select=(wanted.name,), table=scene.table, tail=tail))


def _count_groups(scene: _Scene) -> _Draft:
    column = scene.pick_property()
    text = scene.say(
        "How many {nouns} are there for each {b}?",
        "Count the {nouns} of each {b}.",
        "Show each {b} and its number of {nouns}.",
        b=column.phrase,
    )
    query = Query(select=(column.name, "COUNT(*)"), table=scene.table, tail=f"GROUP BY {column.name}")
    return _Draft(text=text, query=query)


def _comparison(scene: _Scene, number: Column) -> tuple[Condition, str]:
    low, high = number.span
    operator = scene.rng.choice(list(_COMPARED))
    value = scene.rng.randint(low + (high - low) // 4, high - (high - low) // 4)
    return Condition(column=number, operator=operator, value=value), scene.rng.choice(_COMPARED[operator])


def _aggregation(scene: _Scene) -> tuple[str, str]:
    function = scene.rng.choice(list(_AGGREGATES))
    return function, scene.rng.choice(_AGGREGATES[function])


_KINDS: dict[str, Callable[[_Scene], _Draft]] = {
    "select where": _select_where,
    "aggregate where": _aggregate_where,
    "count where": _count_where,
    "select compared": _select_compared,
    "first of an order": _first_of_order,
    "select where two": _select_where_two,
    "select two columns": _select_two_columns,
    "count compared": _count_compared,
    "aggregate": _aggregate,
    "count groups": _count_groups,
}
