// A client of crypto/tls: posts $BODY three times to its first argument, trusting the CA file in
// $CA. A second argument asks for HTTP/2.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
)

func main() {
	roots := x509.NewCertPool()
	if pem, err := os.ReadFile(os.Getenv("CA")); err == nil {
		roots.AppendCertsFromPEM(pem)
	}
	transport := &http.Transport{
		TLSClientConfig:    &tls.Config{RootCAs: roots},
		DisableCompression: true,
		ForceAttemptHTTP2:  len(os.Args) > 2,
	}
	if address := os.Getenv("ADDRESS"); address != "" {
		transport.Dial = func(network, _ string) (net.Conn, error) {
			return net.Dial(network, address)
		}
	}
	body := os.Getenv("BODY")
	if body == "" {
		body = `{"model":"m"}`
	}
	client := &http.Client{Transport: transport}
	for i := 0; i < 3; i++ {
		response, err := client.Post(os.Args[1], "application/json", strings.NewReader(body))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		answer, _ := io.ReadAll(response.Body)
		response.Body.Close()
		fmt.Println(response.StatusCode, len(answer))
	}
}
