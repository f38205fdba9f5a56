// An HTTPS server, and a client that hides the server's name from everybody else (ECH, RFC 9849).
//
//	go_ech ADDRESS NAME PUBLIC-NAME KEY-LOG
//
// NAME is asked for three times, on one connection, whose hello shows PUBLIC-NAME.
package main

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"time"
)

func u16(n int) []byte { return binary.BigEndian.AppendUint16(nil, uint16(n)) }

func echConfig(public []byte, name string) []byte {
	var b bytes.Buffer
	b.WriteByte(7)        // config id
	b.Write(u16(0x20))    // DHKEM(X25519)
	b.Write(u16(len(public)))
	b.Write(public)
	b.Write(u16(4))
	b.Write(u16(1)) // HKDF-SHA256
	b.Write(u16(1)) // AES-128-GCM
	b.WriteByte(32)
	b.WriteByte(byte(len(name)))
	b.WriteString(name)
	b.Write(u16(0))
	return append(append(u16(0xfe0d), u16(b.Len())...), b.Bytes()...)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func main() {
	listen, inner, outer, keys := os.Args[1], os.Args[2], os.Args[3], os.Args[4]
	secret := must(ecdh.X25519().GenerateKey(rand.Reader))
	config := echConfig(secret.PublicKey().Bytes(), outer)
	list := append(u16(len(config)), config...)
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: inner},
		DNSNames: []string{inner, outer}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	roots := x509.NewCertPool()
	roots.AddCert(must(x509.ParseCertificate(der)))
	asked := 0
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		asked++
		fmt.Printf("hidden: %v\n", r.TLS.ECHAccepted && r.TLS.ServerName == inner)
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"id":"msg_01Hidden%08d","type":"message","role":"assistant","content":[],`+
			`"model":"claude-opus-4-8","usage":{"input_tokens":%d,"output_tokens":5}}`, asked, 10*asked)
	}), TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		EncryptedClientHelloKeys: []tls.EncryptedClientHelloKey{{Config: config, PrivateKey: secret.Bytes(), SendAsRetry: true}}}}
	listener := must(net.Listen("tcp", listen))
	go server.ServeTLS(listener, "", "")
	log := must(os.OpenFile(keys, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0600))
	client := http.Client{Transport: &http.Transport{
		Dial: func(string, string) (net.Conn, error) { return net.Dial("tcp", listen) },
		TLSClientConfig: &tls.Config{RootCAs: roots, KeyLogWriter: log, EncryptedClientHelloConfigList: list}}}
	for i := 0; i < 3; i++ {
		response := must(client.Post("https://"+inner+"/v1/messages", "application/json", bytes.NewReader([]byte(`{"model":"claude-opus-4-8","max_tokens":9,"messages":[{"role":"user","content":"hi"}]}`))))
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
	}
}
