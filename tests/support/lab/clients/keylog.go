// A client with a key log of its own: POSTs a body to a URL, over so many connections that each
// resumes the one before. Usage: keylog URL VERSION CONNECTIONS; SSLKEYLOGFILE, CA and BODY name
// the key log, the authority and the body. Prints a line a connection: its version, whether resumed.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
)

var names = map[uint16]string{tls.VersionTLS12: "TLS 1.2", tls.VersionTLS13: "TLS 1.3"}

func main() {
	keys, err := os.OpenFile(os.Getenv("SSLKEYLOGFILE"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	check(err)
	authority, err := os.ReadFile(os.Getenv("CA"))
	check(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	version := map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13}[os.Args[2]]
	count, err := strconv.Atoi(os.Args[3])
	check(err)
	transport := &http.Transport{TLSClientConfig: &tls.Config{
		RootCAs: roots, KeyLogWriter: keys, MinVersion: version, MaxVersion: version,
		ClientSessionCache: tls.NewLRUClientSessionCache(4),
	}}
	client := &http.Client{Transport: transport}
	for n := 0; n < count; n++ {
		answer, err := client.Post(os.Args[1], "application/json", strings.NewReader(os.Getenv("BODY")))
		check(err)
		_, err = io.Copy(io.Discard, answer.Body)
		check(err)
		answer.Body.Close()
		fmt.Println(names[answer.TLS.Version], answer.TLS.DidResume)
		transport.CloseIdleConnections()
	}
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
