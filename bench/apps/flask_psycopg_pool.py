"""Flask with psycopg 3 and its pool, as the pool's documentation has it."""

import os

from flask import Flask, render_template
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

app = Flask(__name__, template_folder=".")
options = {"autocommit": True, "row_factory": dict_row}
pool = ConnectionPool(os.environ["DATABASE_URL"], kwargs=options, open=True)


@app.get("/items/<int:number>")
def item(number):
    with pool.connection() as conn:
        query = "SELECT id, name FROM items WHERE id = %s"
        return conn.execute(query, [number]).fetchone()


@app.get("/items")
def items():
    with pool.connection() as conn:
        query = "SELECT id, name FROM items ORDER BY id LIMIT 20"
        rows = conn.execute(query).fetchall()
    return render_template("items.html", items=rows)
