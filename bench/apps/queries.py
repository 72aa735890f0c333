"""Print what each way to query costs: round trips, and microseconds of time and CPU."""

import os
import statistics
import sys
import time
from random import sample

import psycopg
import psycopg2

ROUNDS, CALLS = map(int, sys.argv[1:])
ROW = "SELECT id, name FROM items WHERE id = %s"
JOIN = """
    SELECT a.id, a.name FROM items a
    JOIN items b USING (id) JOIN items c USING (id)
    JOIN items d USING (id) JOIN items e USING (id)
    WHERE a.id = %s
"""
INSERT = "INSERT INTO notes (body) VALUES (%s)"
NOTES = "CREATE TEMPORARY TABLE notes (body text)"

old = psycopg2.connect(os.environ["DATABASE_URL"])
old.autocommit = True
old_cursor = old.cursor()
old_cursor.execute(NOTES)
old_cursor.execute("PREPARE row (integer) AS " + ROW.replace("%s", "$1"))
old_cursor.execute("PREPARE five (integer) AS " + JOIN.replace("%s", "$1"))
new = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
new.execute(NOTES)
new_cursor = new.cursor()
binary_cursor = new.cursor(binary=True)


def psycopg2_(query, parameter=42, before=None):
    if before:
        old_cursor.execute(before)
    old_cursor.execute(query, [parameter])
    if old_cursor.description:
        old_cursor.fetchone()


def psycopg2_transaction(query, parameter=42):
    old.autocommit = False
    with old:
        psycopg2_(query, parameter)
    old.autocommit = True


def psycopg_(query, parameter=42, prepare=True, cursor=new_cursor):
    cursor.execute(query, [parameter], prepare=prepare)
    if cursor.description:
        cursor.fetchone()


def psycopg_transaction(query, parameter=42):
    with new.transaction():
        psycopg_(query, parameter)


def psycopg_pipeline(*queries):
    with new.pipeline():
        cursors = [new.execute(query, [42], prepare=True) for query in queries]
    for cursor in cursors:
        cursor.fetchone()


def psycopg_pipelined_transaction(query, parameter):
    with new.pipeline(), new.transaction():
        new.execute(query, [parameter], prepare=True)


def three(function):
    for _ in range(3):
        function(ROW)


SET = "SET statement_timeout = 5000"
NOTE = "A note"
WAYS = {  # by name: the round trips, and a function that makes them
    "a row: psycopg2": (1, lambda: psycopg2_(ROW)),
    "a row: psycopg2, EXECUTE": (1, lambda: psycopg2_("EXECUTE row (%s)")),
    "a row: psycopg2, SET before": (2, lambda: psycopg2_(ROW, before=SET)),
    "a row: psycopg2, transaction": (3, lambda: psycopg2_transaction(ROW)),
    "a row: psycopg 3, unprepared": (1, lambda: psycopg_(ROW, prepare=False)),
    "a row: psycopg 3, prepared": (1, lambda: psycopg_(ROW)),
    "a row: psycopg 3, binary": (1, lambda: psycopg_(ROW, cursor=binary_cursor)),
    "a row: psycopg 3, transaction": (3, lambda: psycopg_transaction(ROW)),
    "a join of five: psycopg2": (1, lambda: psycopg2_(JOIN)),
    "a join of five: psycopg2, EXECUTE": (1, lambda: psycopg2_("EXECUTE five (%s)")),
    "a join of five: psycopg 3, prepared": (1, lambda: psycopg_(JOIN)),
    "three rows: psycopg2": (3, lambda: three(psycopg2_)),
    "three rows: psycopg 3, prepared": (3, lambda: three(psycopg_)),
    "three rows: psycopg 3, pipeline": (1, lambda: psycopg_pipeline(ROW, ROW, ROW)),
    "an INSERT: psycopg2": (1, lambda: psycopg2_(INSERT, NOTE)),
    "an INSERT: psycopg2, transaction": (
        3,
        lambda: psycopg2_transaction(INSERT, NOTE),
    ),
    "an INSERT: psycopg 3, transaction": (
        3,
        lambda: psycopg_transaction(INSERT, NOTE),
    ),
    "an INSERT: psycopg 3, transaction in a pipeline": (
        1,
        lambda: psycopg_pipelined_transaction(INSERT, NOTE),
    ),
}


def microseconds(function):
    function()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(CALLS):
        function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return 1e6 * wall / CALLS, 1e6 * cpu / CALLS


found = {name: [] for name in WAYS}
for _ in range(ROUNDS):
    for name in sample(list(WAYS), len(WAYS)):
        found[name].append(microseconds(WAYS[name][1]))
for name, pairs in found.items():
    wall, cpu = map(statistics.median, zip(*pairs, strict=True))
    print(f"| {name} | {WAYS[name][0]} | {wall:,.0f} | {cpu:,.0f} |")
