"""What people and root have set: config.toml, read and judged; nothing here acts on it."""
