"""Flask without a database."""

from flask import Flask, render_template

app = Flask(__name__, template_folder=".")


@app.get("/items/<int:number>")
def item(number):
    return {"id": number, "name": f"item {number}"}


@app.get("/items")
def items():
    rows = [{"id": number, "name": f"item {number}"} for number in range(1, 21)]
    return render_template("items.html", items=rows)
