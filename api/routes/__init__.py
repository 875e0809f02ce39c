"""The gateway's routes, one module for each kind of thing."""

from fastapi import APIRouter

from api.routes import commands, devices, enrollment, health, telemetry, tokens

ROUTERS: tuple[APIRouter, ...] = (
    devices.router,
    enrollment.router,
    commands.router,
    telemetry.router,
    tokens.router,
    health.router,
)
