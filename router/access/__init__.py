"""Who a caller is and what it may do: keys, tokens, certificates, tenants, roles, and the record of admin actions."""
