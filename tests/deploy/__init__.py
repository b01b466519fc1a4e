"""Images and manifests: linted, rendered, validated, checked against the code, and run as far as processes go."""
