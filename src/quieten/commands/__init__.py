"""What the commands do, a module each; `cli` holds how they are typed."""
