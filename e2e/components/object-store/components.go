//go:build components

// Package components names the object store, so that go.mod and go.sum pin every module
// it needs.
package components

import _ "github.com/versity/versitygw/cmd/versitygw"
