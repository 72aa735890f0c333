"""A project of cookiecutter-flask as baked, with the two pages."""

from app.app import create_app as create_project
from app.database import Column, PkModel, db
from flask import Blueprint, render_template

bp = Blueprint("items", __name__, template_folder=".")


class Item(PkModel):
    __tablename__ = "items"
    name = Column(db.Text, nullable=False)


@bp.get("/items/<int:number>")
def item(number):
    found = Item.get_by_id(number)
    return {"id": found.id, "name": found.name}


@bp.get("/items")
def items():
    found = Item.query.order_by(Item.id).limit(20)
    return render_template("items.html", items=found)


def create_app():
    app = create_project()
    app.register_blueprint(bp)
    return app
