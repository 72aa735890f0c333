"""FastAPI with asyncpg and its pool."""

import os
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from fastapi.templating import Jinja2Templates


@asynccontextmanager
async def lifespan(app):
    async with asyncpg.create_pool(os.environ["DATABASE_URL"]) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan)
templates = Jinja2Templates(directory=Path(__file__).parent)


@app.get("/items/{number}")
async def item(request: Request, number: int):
    async with request.app.state.pool.acquire() as conn:
        query = "SELECT id, name FROM items WHERE id = $1"
        return dict(await conn.fetchrow(query, number))


@app.get("/items", response_class=HTMLResponse)
async def items(request: Request):
    async with request.app.state.pool.acquire() as conn:
        rows = await conn.fetch("SELECT id, name FROM items ORDER BY id LIMIT 20")
    return templates.TemplateResponse(request, "items.html", {"items": rows})
