"""Django with its ORM and its pool of psycopg connections."""

from django.db import models
from django.http import JsonResponse
from django.shortcuts import get_object_or_404, render
from django.urls import path


class Item(models.Model):
    name = models.TextField()

    class Meta:
        app_label = "items"
        db_table = "items"
        managed = False


def item(request, number):
    found = get_object_or_404(Item, pk=number)
    return JsonResponse({"id": found.id, "name": found.name})


def items(request):
    found = Item.objects.order_by("id")[:20]
    return render(request, "items.html", {"items": found})


urlpatterns = [path("items/<int:number>", item), path("items", items)]
