"""Comparisons of pictures, kept in a folder: who preferred which of two, in SQLite, and the pictures as PNG.

    FOLDER/comparisons.sqlite     pairs, answers, and which run they are of
    FOLDER/pictures/HASH.png      each picture once, named by its content

Every call is a transaction on a connection of its own: threads, windows and processes may share a folder, and what was
answered is on the disk when `answer` returns (write-ahead log, full synchronisation). File names are hashes,
looked up in the folder alone: nothing in a database that somebody passed on can name another file. A kill loses
nothing; a power cut may cost pictures of the last seconds, which are then named as missing.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from foveate.data.kept_pictures import file_of, keep, read_kept, size_of
from foveate.types import InputError

Answer = Literal["left", "right", "tie", "skip"]
ANSWERS: tuple[Answer, ...] = ("left", "right", "tie", "skip")
PREFERENCES = {"left": 1.0, "right": 0.0, "tie": 0.5}  # a pair that was skipped says nothing

FILE = "comparisons.sqlite"
VERSION = 1
LEASE = 600.0  # seconds for which a pair that one window shows is not shown by another
PATIENCE = 30.0  # seconds to wait for another process's transaction
LONGEST = 40  # characters of a judge's name
SIDE = 2048  # pixels of a picture at most

_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE pairs (
    id INTEGER PRIMARY KEY,
    input INTEGER NOT NULL,
    "left" TEXT NOT NULL,
    "right" TEXT NOT NULL,
    chosen TEXT NOT NULL,
    shown_in TEXT,
    shown_until REAL NOT NULL DEFAULT 0,
    closed INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX open_pairs ON pairs (closed, id);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY,
    pair INTEGER NOT NULL REFERENCES pairs (id),
    answer TEXT NOT NULL CHECK (answer IN ('left', 'right', 'tie', 'skip')),
    judge TEXT NOT NULL,
    shown_in TEXT NOT NULL,
    at TEXT NOT NULL,
    left_score REAL,
    right_score REAL,
    UNIQUE (pair, shown_in)
);
"""


@dataclass(frozen=True)
class Pair:
    """Two pictures that wait for an answer: their number, and their files' names."""

    id: int
    left: str
    right: str


@dataclass(frozen=True)
class Proposal:
    """A pair to ask about.

    Attributes:
        id: its number; the first of a number that is proposed stays.
        input: which input both answer.
        left, right: the pictures.
        chosen: how it was chosen: "random" or "uncertain".
    """

    id: int
    input: int
    left: UInt8[Tensor, "3 height width"]
    right: UInt8[Tensor, "3 height width"]
    chosen: str


@dataclass(frozen=True)
class Compared:
    """Comparisons as tensors; each picture once.

    Attributes:
        pictures: all that were compared.
        left, right: which of them, for each comparison.
        preferences: 1 left, 0 right, 1/2 tie.
        inputs: which input both answer.
        hidden: the scripted judge's own scores of both, NaN where people answered.
    """

    pictures: UInt8[Tensor, "size 3 height width"]
    left: Int[Tensor, " pairs"]
    right: Int[Tensor, " pairs"]
    preferences: Float[Tensor, " pairs"]
    inputs: Int[Tensor, " pairs"]
    hidden: Float[Tensor, "pairs 2"]

    def __len__(self) -> int:
        return len(self.preferences)

    def to(self, device: torch.device | str) -> Compared:
        """The same on a device, but for the pictures, which stay."""
        names = ("left", "right", "preferences", "inputs", "hidden")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class Comparisons:
    """The comparisons in a folder.

    Args:
        folder: where they are.
        run: what tells the run whose answers are compared from others (`foveate.preferring.identity`).
        question: what is asked; kept with the first comparison. None: any.
        make: begin a database if there is none.

    Raises:
        InputError: there is none and none is to be made; it is no database, of another version, of another run, or of
            another question.
    """

    def __init__(self, folder: Path, run: str, question: str | None = None, make: bool = False) -> None:
        self.folder, self.path, self.pictures = folder, folder / FILE, folder / "pictures"
        if not make and not self.path.is_file():
            raise InputError(f"{self.path}: there are no comparisons yet; make some: foveate prefer {folder.parent}")
        folder.mkdir(parents=True, exist_ok=True)
        self._size: str | None = None
        with self._transaction(make) as database:
            if make and not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {VERSION}")
                self._tell(database, "run", run)
                self._tell(database, "question", question or "")
            found = database.execute("PRAGMA user_version").fetchone()[0]
            if found != VERSION:
                raise InputError(
                    f"{self.path}: found version {found}, expected {VERSION}: it was made by another foveate; install "
                    "that version, or move the file away and compare anew"
                )
            told = dict(database.execute("SELECT name, value FROM about"))
        self._idle = self._connection()  # while one is open, closing another does not copy the log into the database
        weakref.finalize(self, self._idle.close)
        self._idle.execute("SELECT count(*) FROM about").fetchone()
        if told.get("run") != run:
            raise InputError(
                f"{self.path}: found comparisons of another run ({told.get('run')}, this is {run}); put them back "
                "beside their own run, or move the file away and compare anew"
            )
        self.question = told.get("question", "")
        if question and question != self.question:
            raise InputError(
                f"{self.path}: found answers to {self.question!r}, asked is {question!r}; leave --question out, or "
                "move the file away and compare anew"
            )

    def propose(self, proposals: Sequence[Proposal]) -> None:
        """Add pairs to ask about. Their pictures are written first; numbers that are there already stay as they are.

        Raises:
            InputError: a picture of another size than those that are there, or of more than `SIDE` pixels.
        """
        for proposal in proposals:
            for picture in (proposal.left, proposal.right):
                if max(picture.shape[1:]) > SIDE:
                    raise InputError(
                        f"pictures: {size_of(picture)} pixels, expected at most {SIDE} a side; make them smaller"
                    )
        rows = [
            (each.id, each.input, keep(self.pictures, each.left), keep(self.pictures, each.right), each.chosen)
            for each in proposals
        ]
        with self._transaction() as database:
            for proposal in proposals:
                for picture in (proposal.left, proposal.right):
                    self._check_size(database, size_of(picture))
            statement = 'INSERT OR IGNORE INTO pairs (id, input, "left", "right", chosen) VALUES (?, ?, ?, ?, ?)'
            database.executemany(statement, rows)

    def claim(self, window: str) -> Pair | None:
        """The pair that a window is to show: its own again if it has one, else the first that no other shows.

        None if there is none. It is the window's for `LEASE` seconds: a window that was closed gives it back so.
        """
        with self._transaction() as database:
            now = datetime.now(UTC).timestamp()
            row = database.execute(
                'SELECT id, "left", "right" FROM pairs WHERE NOT closed AND (shown_in = ? OR shown_until < ?) '
                "ORDER BY shown_in IS NOT ?, id LIMIT 1",
                (window, now, window),
            ).fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE pairs SET shown_in = ?, shown_until = ? WHERE id = ?", (window, now + LEASE, row[0])
            )
        return Pair(*row)

    def answer(
        self,
        pair: int,
        answer: Answer,
        judge: str,
        window: str,
        scores: tuple[float, float] | None = None,
    ) -> bool:
        """Store an answer; it is on the disk when this returns. False if this window has answered the pair already.

        Args:
            pair: its number.
            answer: what was chosen.
            judge: who; cut at `LONGEST` characters.
            window: where it was shown.
            scores: of left and right, if the judge is a function.

        Raises:
            ValueError: there is no such answer, or no such pair.
        """
        if answer not in ANSWERS:
            raise ValueError(f"answer: {answer!r}, expected one of {', '.join(ANSWERS)}")
        name = " ".join("".join(letter if letter.isprintable() else " " for letter in judge).split())[:LONGEST]
        row = pair, answer, name, window, datetime.now(UTC).isoformat(timespec="seconds"), *(scores or (None, None))
        with self._transaction() as database:
            if not database.execute("SELECT 1 FROM pairs WHERE id = ?", (pair,)).fetchone():
                raise ValueError(f"pair: there is none of number {pair}")
            made = database.execute(
                "INSERT OR IGNORE INTO answers (pair, answer, judge, shown_in, at, left_score, right_score) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            database.execute("UPDATE pairs SET closed = 1 WHERE id = ?", (pair,))
            return made.rowcount == 1

    def counts(self) -> dict[str, int]:
        """How many of each answer there are, and "waiting", the pairs without one."""
        with self._transaction() as database:
            told = dict(database.execute("SELECT answer, count(*) FROM answers GROUP BY answer"))
            waiting = database.execute("SELECT count(*) FROM pairs WHERE NOT closed").fetchone()[0]
        return {answer: told.get(answer, 0) for answer in ANSWERS} | {"waiting": waiting}

    def next_id(self) -> int:
        """The first number that no pair has."""
        with self._transaction() as database:
            return int(database.execute("SELECT coalesce(max(id) + 1, 0) FROM pairs").fetchone()[0])

    def png(self, name: str) -> bytes:
        """The file of a picture."""
        return file_of(self.pictures, name).read_bytes()

    def picture(self, name: str) -> UInt8[Tensor, "3 height width"]:
        """A picture.

        Raises:
            InputError: the file is missing, no PNG, or of another size than the others.
        """
        return read_kept(self.pictures, name, self._size or self._read_size())

    def load(self, least: int = 1) -> Compared:
        """All comparisons in the order of the answers, less those that were skipped.

        Raises:
            InputError: there are fewer than `least`, or all are ties, which say nothing.
        """
        with self._transaction() as database:
            rows = database.execute(
                'SELECT "left", "right", answer, input, left_score, right_score FROM answers JOIN pairs '
                "ON pairs.id = answers.pair WHERE answer != 'skip' ORDER BY answers.id"
            ).fetchall()
        again = f"foveate prefer {self.folder.parent}"
        if not rows:
            raise InputError(f"{self.path}: found no comparisons, expected at least {least}; make some: {again}")
        if all(row[2] == "tie" for row in rows):
            raise InputError(f"{self.path}: all {len(rows)} comparisons are ties, which prefer nothing; go on: {again}")
        if len(rows) < least:
            raise InputError(f"{self.path}: found {len(rows)} comparisons, expected at least {least}; go on: {again}")
        names = {name: place for place, name in enumerate(dict.fromkeys(name for row in rows for name in row[:2]))}
        return Compared(
            torch.stack([self.picture(name) for name in names]),
            torch.tensor([names[row[0]] for row in rows]),
            torch.tensor([names[row[1]] for row in rows]),
            torch.tensor([PREFERENCES[row[2]] for row in rows]),
            torch.tensor([row[3] for row in rows]),
            torch.tensor([[float("nan") if score is None else score for score in row[4:]] for row in rows]),
        )

    def _read_size(self) -> str | None:
        with self._transaction() as database:
            self._size = dict(database.execute("SELECT name, value FROM about")).get("size")
        return self._size

    def _check_size(self, database: sqlite3.Connection, size: str) -> None:
        expected = dict(database.execute("SELECT name, value FROM about")).get("size")
        if expected is None:
            self._tell(database, "size", size)
        elif expected != size:
            raise InputError(f"{self.path}: holds pictures of {expected} pixels, found {size}; compare anew elsewhere")

    @staticmethod
    def _tell(database: sqlite3.Connection, name: str, value: str) -> None:
        database.execute("INSERT INTO about (name, value) VALUES (?, ?)", (name, value))

    def _connection(self, make: bool = False) -> sqlite3.Connection:
        address = f"{self.path.absolute().as_uri()}?mode={'rwc' if make else 'rw'}"
        return sqlite3.connect(address, PATIENCE, isolation_level=None, uri=True, check_same_thread=False)

    @contextmanager
    def _transaction(self, make: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection within a transaction that writes all or nothing."""
        try:
            with closing(self._connection(make)) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = FULL")
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                except BaseException:
                    database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise InputError(f"{self.path}: {error}; is it writable, and does a process hold it?") from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path}: is no database of comparisons ({error}); move it away") from error
