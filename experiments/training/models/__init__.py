"""The two model families, written as plain torch; no low-precision code lives here."""
