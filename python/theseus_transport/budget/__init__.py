"""Memory and time a run will take, and the choices that make it fit."""
