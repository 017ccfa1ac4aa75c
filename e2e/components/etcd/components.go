//go:build components

// Package components names etcd, so that go.mod and go.sum pin every module it needs.
package components

import _ "go.etcd.io/etcd/server/v3"
