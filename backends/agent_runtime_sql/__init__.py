"""What the SQL backends share: tables, migrations, statements. Functions to call, no class to inherit from."""
