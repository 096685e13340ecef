"""Messages about a sweep: what happened, to a webhook or by e-mail, each once, by whichever process sees it first."""
