"""Who is it? Device tokens, issued tokens, the login decision, enrollment."""
