"""Flask-SQLAlchemy and its ORM, as in its quick start."""

import os

from flask import Flask, render_template
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
app = Flask(__name__, template_folder=".")
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
db.init_app(app)


class Item(db.Model):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@app.get("/items/<int:number>")
def item(number):
    found = db.get_or_404(Item, number)
    return {"id": found.id, "name": found.name}


@app.get("/items")
def items():
    query = db.select(Item).order_by(Item.id).limit(20)
    return render_template("items.html", items=db.session.execute(query).scalars())
