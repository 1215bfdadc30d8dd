"""The router program: takes requests of clients, knows who owns what, sends each part there, gathers the answers."""
