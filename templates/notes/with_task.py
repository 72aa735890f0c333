"""Notes, the example: a list and a form, as a page and as JSON."""

import re
from collections.abc import Mapping

from flask import Blueprint, abort, jsonify, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from psycopg2.extras import RealDictCursor

from .core.db import get_db
from .core.errors import wants_json
from .tasks import count_words

bp = Blueprint("notes", __name__, url_prefix="/notes")


@bp.get("")
def index() -> ResponseReturnValue:
    """List the latest 100 notes, the newest first."""
    with get_db().cursor(cursor_factory=RealDictCursor) as cursor:
        cursor.execute("SELECT id, body FROM notes ORDER BY id DESC LIMIT 100")
        notes = cursor.fetchall()
    if wants_json():
        return jsonify(notes)
    return render_template("notes.html", notes=notes)


@bp.post("")
def add() -> ResponseReturnValue:
    """Add a note from the form, or from JSON such as `{"body": "Buy milk"}`."""
    body = _body()
    with get_db() as db, db.cursor(cursor_factory=RealDictCursor) as cursor:
        insert = "INSERT INTO notes (body) VALUES (%s) RETURNING id, body"
        cursor.execute(insert, [body])
        [note] = cursor.fetchall()
        count_words.delay(note["id"])
    if request.is_json:
        return jsonify(note), 201
    return redirect(url_for("notes.index"))


def _body() -> str:
    data = request.get_json() if request.is_json else request.form
    body = data.get("body") if isinstance(data, Mapping) else None
    # PostgreSQL's text holds neither NUL nor half of a surrogate pair.
    text = re.compile(r"[^\0\ud800-\udfff]{1,1000}")
    if not isinstance(body, str) or not text.fullmatch(body.strip()):
        abort(400, "body: give the note 1 to 1,000 characters of text.")
    return body.strip()
